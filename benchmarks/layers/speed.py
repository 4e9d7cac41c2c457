"""A mixer of each prior against rotary attention of about equal parameters, forward and backward, float32 and bf16.

Floor: the projections of both sides hold the same 4 D^2 weights, and the softmax read with two signals per channel is
as wide as plain attention's values, so equal time is the floor of the softmax mixer; what lies above it are passes
over memory (conditioning, gates, exponentials). bf16 is autocast around float32 weights, input and output gradient.

    python benchmarks/layers/speed.py --threads 2 --keep-memory
    python tools/against.py 252ba62 benchmarks/layers/speed.py --threads 2 --keep-memory     # beside another commit
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import gate, interleave, parse_options, print_table, write_results

from helmholtz.layers import Attention, FreeEnergyMixer, FreeEnergyMixerConfig

D_MODEL, HEADS = 512, 8
SHAPES = ((2, 1024), (1, 4096))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOALS = {
    ("softmax", "float32"): (1.10, 1.06), ("linear", "float32"): (0.80, 0.38), ("gla", "float32"): (0.95, 0.48),
    ("rnn_softmax", "float32"): (0.75, 0.38), ("mamba", "float32"): (1.15, 0.60),
    ("softmax", "bfloat16"): (1.25,), ("linear", "bfloat16"): (1.10,), ("gla", "bfloat16"): (1.25,),
    ("rnn_softmax", "bfloat16"): (1.00,), ("mamba", "bfloat16"): (1.50,),
}  # fmt: skip
"""Ratios to attention that were wanted, in the order of ``SHAPES``."""
VALUE_WIDTHS = {"softmax": None, "linear": None, "gla": None, "rnn_softmax": 42, "mamba": 50}
"""Value width per head that brings each mixer near 4 D^2 parameters; None is the published sizing."""


def mixer(prior: str) -> FreeEnergyMixer:
    """A mixer whose conditioning has an effect, as after some training."""
    torch.manual_seed(0)
    layer = FreeEnergyMixer(
        FreeEnergyMixerConfig(d_model=D_MODEL, n_heads=HEADS, prior=prior, d_head_v=VALUE_WIDTHS[prior])  # type: ignore[arg-type]
    )
    assert layer.tdc is not None
    nn.init.normal_(layer.tdc.out_proj.weight, std=0.02)
    return layer


def step(
    layer: nn.Module, x: Tensor, cotangent: Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One forward and backward pass: the output and every gradient."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), cotangent.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("dx", *names), grads, strict=True))}


def check(prior: str, dtype: torch.dtype = torch.float32) -> None:
    """The layer in that dtype against itself in float64 on a length that fills no chunk."""
    layer = mixer(prior)
    x, cotangent = torch.randn(2, 130, D_MODEL), torch.randn(2, 130, D_MODEL)
    actual = step(layer, x, cotangent, dtype)
    expected = step(layer.double(), x.double(), cotangent.double(), torch.float64)
    gate(f"{prior}, {dtype}", actual, expected, budget=200 if dtype == torch.float32 else 8, dtype=dtype)


def measure(dtype: str, batch: int, time: int, rounds: int) -> list[dict[str, Any]]:
    """All priors and attention in turn."""
    layers: dict[str, nn.Module] = {"attention": Attention(D_MODEL, HEADS)}
    layers |= {prior: mixer(prior) for prior in VALUE_WIDTHS}
    x, cotangent = torch.randn(batch, time, D_MODEL), torch.randn(batch, time, D_MODEL)
    seconds = interleave(
        {name: partial(step, layer, x, cotangent, DTYPES[dtype]) for name, layer in layers.items()},
        rounds=rounds,
        warmup=6,
    )
    place = SHAPES.index((batch, time))
    return [
        {
            "mixer": name,
            "dtype": dtype,
            "B": batch,
            "T": time,
            "parameters": sum(p.numel() for p in layers[name].parameters()) / (4 * D_MODEL**2),
            "milliseconds": 1e3 * seconds[name],
            "attention_milliseconds": 1e3 * seconds["attention"],
            "ratio": seconds[name] / seconds["attention"],
            "goal": dict(enumerate(GOALS[name, dtype])).get(place),
        }
        for name in VALUE_WIDTHS
    ]


def main() -> None:
    options = parse_options("layers_speed", __doc__, rounds=9)
    for dtype in DTYPES.values():
        for prior in VALUE_WIDTHS:
            check(prior, dtype)
    rows = [
        row
        for dtype in DTYPES
        for batch, time in SHAPES
        for row in measure(dtype, batch, time, options.rounds)
    ]
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
