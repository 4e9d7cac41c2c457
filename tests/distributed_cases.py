"""Runs that are made by one process and by several, and the command that makes them by several."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from helmholtz.models import MODELS
from helmholtz.training.config import TrainConfig
from helmholtz.training.equilibrium import EquilibriumObjectiveConfig
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.run import RunConfig

TESTS = Path(__file__).parent
SIZES = {
    "transformer": {"n_layers": 2, "n_heads": 2, "dropout": 0.1},
    "fem_lm": {"n_layers": 2, "n_heads": 2, "dropout": 0.1},
    "free_transformer": {"n_layers": 2, "n_heads": 2, "n_latent_bits": 4, "dropout": 0.1},
    "mamba_hopfield": {"n_layers": 1, "d_head": 8, "d_state": 8, "n_patterns": 16, "n_slots": 8},
}


def distributed_run(data, *, architecture, output, train, parallel=None, objective=None):
    """20 steps of an accumulated global batch of 4, saved and evaluated every 10."""
    settings = {
        "output_dir": str(output),
        "steps": 20,
        "batch_size": 4,
        "seq_len": 16,
        "accumulation": 2,
        "warmup_steps": 3,
        "eval_every": 10,
        "eval_tokens": 64,
        "save_every": 10,
        "threads": 1,
    }
    sizes = {"vocab_size": 257, "d_model": 16, "max_seq_len": 32} | SIZES[architecture]
    if architecture == "mamba_hopfield":
        written = {
            "convergence_weight": 0.1,
            "energy_weight": 0.1,
            "stability_weight": 0.1,
            "memory_write_step": 5,
        }
        objective = EquilibriumObjectiveConfig(**written | (objective or {}))
    return RunConfig(
        architecture=architecture,
        model=MODELS[architecture].config_class.from_dict(sizes),
        data=data,
        train=TrainConfig(**settings | train),
        objective=objective,
        parallel=ParallelConfig(**parallel or {}),
    )


def torchrun(arguments, *, size=2, timeout=800, options=(), **environment):
    """Start ``size`` processes on this machine; the completed launcher with what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *options, *map(str, arguments)]
    settings = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=os.environ | settings, timeout=timeout, capture_output=True, text=True)


def run_cases(folder, data, cases, *, size=2):
    """The runs that ``cases`` describe, as ``distributed_run`` takes them, by ``size`` processes."""
    file = folder / "cases.json"
    described = {"data": asdict(data), "size": size, "cases": cases}
    file.write_text(json.dumps(described))
    done = torchrun([TESTS / "distributed" / "worker.py", file], size=size)
    assert done.returncode == 0, done.stdout + done.stderr
