"""Runs that are made by one process and by several, and the command that makes them by several."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helmholtz._files import point_at
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.checkpoint import step_folder
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.parts import objective_class
from helmholtz.training.run import train as run

TESTS = Path(__file__).parents[1]
STRATEGIES = ("ddp", "fsdp")
WAYS = {
    "hybrid": {"strategy": "fsdp", "replicas": 2},
    "recomputed": {"strategy": "fsdp", "recompute_every": 1},
    "half": {"strategy": "fsdp", "gather_dtype": "bf16"},
}
"""Other ways to share the work."""
TOLERANCE = 1e-6
SIZES = {
    "transformer": {"n_layers": 2, "n_heads": 2, "dropout": 0.1},
    "fem_lm": {"n_layers": 2, "n_heads": 2, "dropout": 0.1},
    "free_transformer": {"n_layers": 2, "n_heads": 2, "n_latent_bits": 4, "dropout": 0.1},
    "mamba_hopfield": {"n_layers": 1, "d_head": 8, "d_state": 8, "n_patterns": 16, "n_slots": 8},
    "decoder": {
        "layers": [
            # at the eps of 1e-6 a query whose features are all 0 divides by almost nothing: rounding times 100
            {"mixer": {"kind": "fem", "n_heads": 2, "prior": prior, "eps": 0.01}, "d_ff": 24}
            for prior in ("gla", "softmax")
        ],
        "plan": {"layer": 1, "n_bits": 4},
        "equilibrium": {"d_head": 8, "d_state": 8, "n_patterns": 16, "n_slots": 8},
        "dropout": 0.1,
    },
}


def distributed_run(data, *, architecture, output, train, parallel=None, objective=None):
    """Steps of an accumulated global batch of 4."""
    settings = {
        "output_dir": str(output),
        "batch_size": 4,
        "seq_len": 16,
        "accumulation": 2,
        "warmup_steps": 2,
        "eval_tokens": 64,
        "threads": 1,
    }
    sizes = {"vocab_size": 257, "d_model": 16, "max_seq_len": 32} | SIZES[architecture]
    model = MODELS[architecture].config_class.from_dict(sizes)
    if model.equilibrium_config() is not None:
        terms = {"convergence_weight": 0.1, "energy_weight": 0.1, "stability_weight": 0.1}
        kind = objective_class(model)
        assert kind is not None
        objective = kind(**terms | {"memory_write_step": 2} | (objective or {}))
    return RunConfig(
        architecture=architecture,
        model=model,
        data=data,
        train=TrainConfig(**settings | train),
        objective=objective,
        parallel=ParallelConfig(**parallel or {}),
    )


def half_of(source, target, step):
    """A copy of a run as it was after ``step``."""
    shutil.copytree(source, target, symlinks=True)
    for path in target.glob("step-*"):
        if path != step_folder(target, step):
            shutil.rmtree(path)
    point_at(target / "last", step_folder(target, step))


def make_runs(folder, data, n_steps, architectures=tuple(SIZES)):
    """Runs of all architectures by one process (``<architecture>-one``) and by two, in every way.

    ``<architecture>-<strategy>-whole``, ``-resumed`` by two from the middle, ``-half`` as it was there, and a Free
    Transformer in the other ``WAYS``.
    """
    train = {"steps": n_steps, "eval_every": n_steps // 2, "save_every": n_steps // 2}
    cases = []
    for architecture in architectures:
        for strategy in STRATEGIES:
            base = {"architecture": architecture, "parallel": {"strategy": strategy}}
            whole, resumed, half = (
                f"{folder}/{architecture}-{strategy}-{x}" for x in ("whole", "resumed", "half")
            )
            cases.append(base | {"output": whole, "train": train})
            again = {"output": resumed, "train": train | {"resume": "auto"}}
            cases.append(base | again | {"halves": [whole, [resumed, half], n_steps // 2]})
    for name, parallel in WAYS.items():
        output = f"{folder}/free_transformer-{name}"
        cases.append(
            {"architecture": "free_transformer", "parallel": parallel, "output": output, "train": train}
        )
    run_cases(folder, data, cases)
    for architecture in architectures:
        run(
            distributed_run(
                data, architecture=architecture, output=folder / f"{architecture}-one", train=train
            )
        )
    return folder, train


def records(folder, kind):
    """What was logged of steps or evaluations, without timings."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines if line["kind"] == kind
    ]


def assert_same_run(one, two, n_steps):
    """The same losses, terms and gradient norms in every step, and the same evaluations."""
    assert len(records(one, "step")) == len(records(two, "step")) == n_steps
    for a, b in zip(records(one, "step"), records(two, "step"), strict=True):
        for name in ("loss", "grad_norm", "bits_per_byte"):
            assert b[name] == pytest.approx(a[name], rel=TOLERANCE), (a["step"], name)
        for name, value in a["terms"].items():
            assert b["terms"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (a["step"], name)
    for a, b in zip(records(one, "eval"), records(two, "eval"), strict=True):
        assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=TOLERANCE)


def assert_equal_runs(one, two):
    """The same to the bit: records and last weights."""
    for kind in ("step", "eval"):
        assert records(one, kind) == records(two, kind)
    first, second = (load_checkpoint(Path(folder) / "last").state_dict() for folder in (one, two))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def python_path():
    """These helpers, before what the tests themselves were given: mutants of the package come that way."""
    return os.pathsep.join([str(TESTS / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])


def torchrun_command(arguments, *, size, options, **environment):
    """The command that starts ``size`` processes on this machine, and its environment."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += ["--rdzv-backend=c10d", *options, *map(str, arguments)]
    return command, os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | environment


def torchrun(arguments, *, size=2, options=(), **environment):
    """Start ``size`` processes on this machine; the completed launcher with what it printed."""
    options = ["--rdzv-endpoint=localhost:0", *options]
    command, environment = torchrun_command(arguments, size=size, options=options, **environment)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def run_cases(folder, data, cases, *, size=2):
    """The runs that ``cases`` describe, as ``distributed_run`` takes them, by ``size`` processes."""
    file = folder / "cases.json"
    described = {"data": asdict(data), "size": size, "cases": cases}
    file.write_text(json.dumps(described))
    done = torchrun([TESTS / "distributed" / "worker.py", file], size=size)
    assert done.returncode == 0, done.stdout + done.stderr
