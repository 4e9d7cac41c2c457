"""A mixer of each prior against plain multi-head attention of about equal parameters, forward and backward.

Floor: the projections of both sides hold the same 4 D^2 weights, and the softmax read with two signals per channel is
as wide as plain attention's values, so equal time is the floor of the softmax mixer; what lies above it are passes
over memory (conditioning, gates, exponentials).

    python benchmarks/layers/speed.py --threads 2 --keep-memory
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


def step(layer: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass: the output and every gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), cotangent)
    return {"y": y.detach(), **dict(zip(("dx", *names), grads, strict=True))}


def check(prior: str) -> None:
    """The layer in float32 against itself in float64 on a length that fills no chunk."""
    layer = mixer(prior)
    x, cotangent = torch.randn(2, 130, D_MODEL), torch.randn(2, 130, D_MODEL)
    actual = step(layer, x, cotangent)
    gate(prior, actual, step(layer.double(), x.double(), cotangent.double()), budget=200)


def main() -> None:
    options = parse_options("layers_speed", __doc__, rounds=11)
    for prior in VALUE_WIDTHS:
        check(prior)
    rows: list[dict[str, Any]] = []
    for batch, time in SHAPES:
        layers: dict[str, nn.Module] = {"attention": Attention(D_MODEL, HEADS)}
        layers |= {prior: mixer(prior) for prior in VALUE_WIDTHS}
        x, cotangent = torch.randn(batch, time, D_MODEL), torch.randn(batch, time, D_MODEL)
        runs = {name: partial(step, layer, x, cotangent) for name, layer in layers.items()}
        for name in VALUE_WIDTHS:
            seconds = interleave({k: runs[k] for k in ("attention", name)}, rounds=options.rounds)
            rows.append(
                {
                    "mixer": name,
                    "B": batch,
                    "T": time,
                    "parameters": sum(p.numel() for p in layers[name].parameters()) / (4 * D_MODEL**2),
                    "milliseconds": 1e3 * seconds[name],
                    "attention_milliseconds": 1e3 * seconds["attention"],
                    "ratio": seconds[name] / seconds["attention"],
                }
            )
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
