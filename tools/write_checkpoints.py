"""Write small trained checkpoints and their numbers, for tests that later code must agree with.

    python tools/write_checkpoints.py checkpoints    tests/models/checkpoints: the folders that are missing
    python tools/write_checkpoints.py weights        tests/models/initial_weights.json
    python tools/write_checkpoints.py losses DATA    tests/learn/demo_losses.json; DATA: the demo's text, prepared

What is committed was written by the code of commit 252ba62, with an environment that imports it. What is there stays.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import helmholtz  # noqa: E402
from helmholtz.data.corpus import shakespeare_files  # noqa: E402
from helmholtz.models.checkpoint import save_checkpoint  # noqa: E402
from helmholtz.training.config import TrainConfig  # noqa: E402
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig  # noqa: E402
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective  # noqa: E402
from helmholtz.training.objectives import ObjectiveFunction, next_token  # noqa: E402
from helmholtz.training.sequences import train_on_sequences  # noqa: E402
from old_numbers import (  # noqa: E402
    CHECKPOINTS,
    DEMO,
    DEMO_LOSSES,
    EXPECTED,
    INITIAL_WEIGHTS,
    SEED,
    demo_steps,
    fingerprint,
    initial_model,
    numbers,
)

VOCABULARY = 37
TRAINING = TrainConfig(steps=50, batch_size=8, seq_len=32, lr=1e-2, warmup_steps=5)
MASKS = ["00011111111111111", "11111111110000000", "10110001011100110"]

TINY = {"vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "max_seq_len": 64}
HEADS = TINY | {"n_heads": 4, "d_ff": 24}
NARROW = HEADS | {"d_model": 16, "n_heads": 2}
PLAN = HEADS | {"n_layers": 3, "n_kv_heads": 2, "n_latent_bits": 5, "split_layer": 2}
UNTIED = {"tie_embeddings": False, "norm_eps": 0.1}
OTHER = UNTIED | {"rope_theta": 30.0}
"""What configs leave at other values: one that is lost on the way to today's changes the logits."""
MAMBA = TINY | {"d_state": 8, "d_head": 16}
EQUILIBRIUM = MAMBA | {
    "d_model": 16,
    "n_patterns": 16,
    "solver": {"max_steps": 100, "rtol": 1e-6, "energy_rtol": 1e-6},
}
PRIORS = ("softmax", "linear", "gla", "rnn_softmax", "mamba")
FEM = {"vocab_size": 65, "d_model": 128, "n_layers": 2, "max_seq_len": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", HEADS),
    "transformer_grouped_untied": ("transformer", HEADS | OTHER | {"n_kv_heads": 2, "dropout": 0.1}),
    **{f"fem_{prior}": ("fem_lm", HEADS | {"prior": prior}) for prior in PRIORS},
    "fem_hybrid_grouped_untied": (
        "fem_lm",
        NARROW | OTHER | {"n_layers": 3, "n_kv_heads": 1, "prior": ["gla", "softmax", "mamba"]},
    ),
    "fem_gla_channel_bias": (
        "fem_lm",
        NARROW
        | {"prior": "gla", "mixer": {"decay": "channel", "bias": True, "tdc_norm_first": False, "cap": 0.5}},
    ),
    "fem_linear_eps": ("fem_lm", NARROW | {"prior": "linear", "mixer": {"eps": 0.1, "d_head_v": 3}}),
    "fem_softmax_bare": (
        "fem_lm",
        NARROW
        | {
            "prior": "softmax",
            "mixer": {"read": "free_energy", "outer_gate": False, "tdc_width": 0, "d_head": 6},
        },
    ),
    "fem_mamba_mean": (
        "fem_lm",
        NARROW | {"prior": "mamba", "mixer": {"read": "mean", "normalize": False, "d_state": 4}},
    ),
    "free_table": ("free_transformer", PLAN),
    "free_bits_untied": ("free_transformer", PLAN | OTHER | {"post_sampler": "bits"}),
    "mamba": ("mamba", MAMBA),
    "mamba_narrow_untied": ("mamba", MAMBA | UNTIED | {"d_inner": 32, "d_conv": 2}),
    "equilibrium_contractive": ("mamba_hopfield", EQUILIBRIUM),
    # warm enough for one attractor per token: which of several is reached may change with a rounding
    "equilibrium_descent_slots": (
        "mamba_hopfield",
        EQUILIBRIUM | UNTIED | {"stability": "descent", "beta": 0.2, "n_slots": 8},
    ),
    "equilibrium_merged_slots": (
        "mamba_hopfield",
        EQUILIBRIUM
        | {"n_slots": 4, "slot_policy": "merge", "novelty": 0.7, "beta": 1.0, "adjoint": "phantom"},
    ),
}
DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer_defaults": ("transformer", {"vocab_size": 65, "n_layers": 2}),
    **{f"fem_{prior}_defaults": ("fem_lm", FEM | {"prior": prior}) for prior in PRIORS},
    "fem_hybrid_defaults": ("fem_lm", FEM | {"prior": ["rnn_softmax", "linear"]}),
    "free_defaults": ("free_transformer", {"vocab_size": 65, "d_model": 64}),
    "mamba_defaults": ("mamba", {"vocab_size": 65, "d_model": 64, "n_layers": 2}),
    "equilibrium_defaults": (
        "mamba_hopfield",
        {"vocab_size": 65, "d_model": 64, "n_layers": 2, "n_slots": 4},
    ),
}
"""Sizes that the configs fill in; of these only the initial weights are stored."""


def checksum(data: Path) -> str:
    """Of the training text's tokens, whatever else the folder says."""
    return hashlib.sha256((data / "train.bin").read_bytes()).hexdigest()


def objective_of(name: str, architecture: str) -> ObjectiveFunction:
    if architecture == "free_transformer":
        return FreeBitsObjective(FreeBitsConfig(kappa_bits=0.5))
    if architecture == "mamba_hopfield":
        write = 40 if "merged" in name else None
        weights = {"energy_weight": 0.01, "convergence_weight": 0.05, "stability_weight": 0.01}
        return EquilibriumObjective(EquilibriumObjectiveConfig(**weights, memory_write_step=write))
    return next_token


def train(name: str, architecture: str, options: dict[str, Any]) -> nn.Module:
    """50 steps on the bytes of a play, after which no parameter is where it began."""
    model = initial_model(architecture, options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    text = torch.tensor(list(shakespeare_files()[0].path.read_bytes()[:20_000])) % VOCABULARY

    def sample(count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - TRAINING.seq_len, (count, 1), generator=generator)
        return text[starts + torch.arange(TRAINING.seq_len + 1)]

    train_on_sequences(model, sample, TRAINING, objective=objective_of(name, architecture))
    for parameter, value in model.named_parameters():
        change = (value - before[parameter]).abs().amax()
        assert change > 1e-4, f"{name}: {parameter} changed by {change:.1g}"
    return model.eval()


def write_checkpoint(name: str, architecture: str, options: dict[str, Any]) -> None:
    model, generator = train(name, architecture, options), torch.Generator().manual_seed(11)
    shape = (len(MASKS), len(MASKS[0]))
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    inputs = {"tokens": tokens, "attention_mask": torch.tensor([[c == "1" for c in row] for row in MASKS])}
    if architecture == "free_transformer":
        inputs["code"] = torch.randint(2 ** options["n_latent_bits"], shape, generator=generator)
    if name == "equilibrium_descent_slots":
        model.write_memory(model(tokens).equilibrium, tokens < 2, in_eval=True)
        assert 0 < model.memory.occupied.sum() < model.memory.n_slots
    if name == "equilibrium_merged_slots":
        assert model.memory.store.counts.amax() > 1
    save_checkpoint(model, CHECKPOINTS / name)
    code = inputs.get("code")
    whole = numbers(model, tokens, code)
    padded = numbers(model, tokens, code, attention_mask=inputs["attention_mask"])
    results = whole | {f"padded_{key}": value for key, value in padded.items()}
    description = {
        "commit": commit(),
        "parameters": str(sum(parameter.numel() for parameter in model.parameters())),
        "tied": str(model.unembed.weight is model.embed.weight),
    }
    tensors = {key: value.contiguous() for key, value in (inputs | results).items()}
    save_file(tensors, CHECKPOINTS / name / EXPECTED, metadata=description)
    size = sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir())
    print(f"{name}: {size / 1000:.0f} kB, logits up to {whole['logits'].abs().max():.1f}")


def commit() -> str:
    """Of the code that is imported, which must be what was committed."""
    folder = Path(helmholtz.__file__).parent
    assert not subprocess.check_output(["git", "status", "--porcelain", "."], cwd=folder), (
        "uncommitted changes"
    )
    return subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], cwd=folder, text=True).strip()


def write_json(file: Path, values: dict[str, Any], key: str) -> None:
    """With a line for each of the values of ``key``."""
    if file.exists():
        sys.exit(f"{file} is there; remove it first")
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values[key].items())
    head = json.dumps({name: value for name, value in values.items() if name != key})[:-1]
    file.write_text(f'{head}, "{key}": {{\n' + ",\n".join(lines) + "\n}}\n")


def initial_weights() -> dict[str, Any]:
    found = {}
    for name, (architecture, options) in (CASES | DEFAULTS).items():
        model = initial_model(architecture, options)
        described = {"architecture": architecture, "options": options, "config": model.config.to_dict()}
        found[name] = described | fingerprint(model)
    return {"commit": commit(), "seed": SEED, "models": found}


def demo_losses(data: Path) -> dict[str, Any]:
    names = sorted(file.stem for file in DEMO.glob("*.yaml"))
    steps = {name: demo_steps(name, data) for name in names}
    return {"commit": commit(), "data": checksum(data), "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write checkpoints and numbers that later code must agree with."
    )
    parser.add_argument("what", choices=("checkpoints", "weights", "losses"))
    parser.add_argument("data", nargs="?", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"code of {commit()}")
    if arguments.what == "checkpoints":
        for name, (architecture, options) in CASES.items():
            if not (CHECKPOINTS / name).exists():
                write_checkpoint(name, architecture, options)
    elif arguments.what == "weights":
        write_json(INITIAL_WEIGHTS, initial_weights(), "models")
    else:
        write_json(DEMO_LOSSES, demo_losses(arguments.data), "steps")


if __name__ == "__main__":
    main()
