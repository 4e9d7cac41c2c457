"""Speed and memory of state-space duality, forward and backward, at the widths of a Mamba-2 layer of 512 channels.

The op is first checked against its float64 reference, then timed in turn with a plain loop over ``unbind`` of the same
recurrence and with `linear_attention` with one decay per head, of which it is the case of shared keys and queries.

    python benchmarks/ops/ssd.py --threads 2 --keep-memory
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import gate, interleave, parse_options, peak_bytes, print_table, write_results

from helmholtz import ops, reference

Op = Callable[..., tuple[Tensor, Tensor]]
HEADS, WIDTH = 8, 64


def loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    h, out = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[2]), []
    for x_t, delta_t, b, c in zip(*(z.unbind(1) for z in (x, delta, B, C)), strict=True):
        added = (delta_t.unsqueeze(-1) * x_t).unsqueeze(-1) * b[:, None, None]
        h = (delta_t * A).exp()[..., None, None] * h + added
        out.append((h * c[:, None, None]).sum(-1))
    return torch.stack(out, 1) + D.unsqueeze(-1) * x, h


def attention(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (z.unsqueeze(1).expand(-1, HEADS, -1, -1) for z in (C, B))
    v = (delta.unsqueeze(-1) * x).transpose(1, 2)
    y, last = ops.linear_attention(q, k, v, (delta * A).transpose(1, 2), backend="torch")
    return y.transpose(1, 2) + D.unsqueeze(-1) * x, last


CANDIDATES: dict[str, Op] = {"ssd": ops.ssd, "loop": loop, "linear_attention": attention}


def step(op: Op, inputs: list[Tensor], cotangent: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass: the output followed by the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        y = op(*leaves)[0]
        return y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))

    return run


def make(batch: int, time: int, states: int) -> list[Tensor]:
    delta, rates = 0.1 * torch.rand(batch, time, HEADS), -torch.linspace(1, 16, HEADS)
    reads = [torch.randn(batch, time, states) for _ in range(2)]
    return [torch.randn(batch, time, HEADS, WIDTH), delta, rates, *reads, torch.rand(HEADS)]


def check(states: int) -> None:
    inputs = make(1, 130, states)
    cotangent = torch.randn_like(inputs[0])
    labels = ["y", "x", "delta", "A", "B", "C", "D"]
    exact = step(reference.ssd, [x.double() for x in inputs], cotangent)()
    for name, op in CANDIDATES.items():
        actual = dict(zip(labels, step(op, inputs, cotangent)(), strict=True))
        gate(name, actual, dict(zip(labels, exact, strict=True)), budget=16)


def measure(batch: int, time: int, states: int, rounds: int) -> dict[str, Any]:
    inputs = make(batch, time, states)
    cotangent = torch.randn_like(inputs[0])
    steps: dict[str, Callable[[], Any]] = {
        name: step(op, inputs, cotangent) for name, op in CANDIDATES.items()
    }
    with torch.no_grad():
        forward = interleave({"forward": lambda: ops.ssd(*inputs)}, rounds=rounds, warmup=1)
    median = interleave(steps, rounds=rounds, warmup=1)
    return {
        "B": batch,
        "T": time,
        "N": states,
        "forward ms": 1e3 * forward["forward"],
        "ms": 1e3 * median["ssd"],
        "loop ms": 1e3 * median["loop"],
        "loop / ssd": median["loop"] / median["ssd"],
        "linear_attention / ssd": median["linear_attention"] / median["ssd"],
        "bytes/token": peak_bytes(steps["ssd"]) / (batch * time),
        "loop bytes/token": peak_bytes(steps["loop"]) / (batch * time),
    }


def main() -> None:
    options = parse_options("ssd", __doc__, rounds=5)
    torch.manual_seed(0)
    rows = []
    for states in (16, 64):
        check(states)
        for batch, time in ((4, 512), (4, 1024), (1, 1024)):
            rows.append(measure(batch, time, states, options.rounds))
            print_table(rows[-1:])
    print()
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
