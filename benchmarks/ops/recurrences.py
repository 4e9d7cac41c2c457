"""Speed and memory of the recurrent ops, forward and backward.

Each op is first checked against its float64 reference, then timed in turn with a plain loop over ``unbind`` of the
same recurrence, and linear attention also with causal softmax attention of the same widths.

    python benchmarks/ops/recurrences.py --keep-memory
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import gate, interleave, parse_options, peak_bytes, print_table, write_results

from helmholtz import ops, reference

Op = Callable[..., tuple[Tensor, Any]]
D_MODEL, HEADS, KEY, SIGNALS = 512, 8, 64, 32
"""The layer whose ops are timed: its key width and two signals of 32 channels plus ones per head."""


def loop_scan(decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h, out = torch.zeros_like(x[:, 0]), []
    for a, b in zip(decay.unbind(1), x.unbind(1), strict=True):
        h = a * h + b
        out.append(h)
    return torch.stack(out, 1), h


def loop_rnn_softmax(k: Tensor, signals: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.cat([signals, torch.ones_like(signals[:, :, :1])], 2)
    top, sums, out = k[:, 0].detach(), torch.zeros_like(rows[:, 0]), []
    for key, row in zip(k.unbind(1), rows.unbind(1), strict=True):
        new = torch.maximum(top, key).detach()
        sums = sums * (top - new).exp().unsqueeze(1) + row * (key - new).exp().unsqueeze(1)
        top = new
        out.append(sums[:, :-1] / sums[:, -1:])
    return torch.stack(out, 1), sums


def loop_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    h, out = u.new_zeros(u.shape[0], u.shape[2], *A.shape), []
    for u_t, delta_t, b, c in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        decay = (delta_t.unsqueeze(-1) * A).exp().unsqueeze(1)
        h = decay * h + (delta_t.unsqueeze(1) * u_t).unsqueeze(-1) * b[:, None, None]
        out.append((h * c[:, None, None]).sum(-1))
    return torch.stack(out, 1) + D * u, h


def step(op: Op, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass: the output followed by the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        out = op(*leaves)[0]
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), None


def scan_inputs(batch: int, time: int) -> list[Tensor]:
    return [torch.rand(batch, time, 32), torch.randn(batch, time, 32)]


def rnn_softmax_inputs(batch: int, time: int) -> list[Tensor]:
    return [torch.randn(batch, time, D_MODEL), torch.randn(batch, time, 2, D_MODEL)]


def selective_scan_inputs(batch: int, time: int) -> list[Tensor]:
    channels, states = D_MODEL // 2, 16
    delta, rates = torch.rand(batch, time, channels), -torch.rand(channels, states)
    weights = [torch.rand(batch, time, states) for _ in range(2)]
    return [torch.randn(batch, time, 3, channels), delta, rates, *weights, torch.rand(channels)]


def linear_inputs(batch: int, time: int) -> list[Tensor]:
    q, k = torch.rand(2, batch, HEADS, time, KEY)
    return [q, k, torch.randn(batch, HEADS, time, 2 * SIGNALS + 1)]


def head_decay_inputs(batch: int, time: int) -> list[Tensor]:
    return [*linear_inputs(batch, time), F.logsigmoid(torch.randn(batch, HEADS, time)) / 16]


def channel_decay_inputs(batch: int, time: int) -> list[Tensor]:
    return [*linear_inputs(batch, time), F.logsigmoid(torch.randn(batch, HEADS, time, KEY)) / 16]


CASES: dict[str, tuple[Op, Op, Op, Callable[[int, int], list[Tensor]]]] = {
    "first_order_scan": (ops.first_order_scan, loop_scan, reference.first_order_scan, scan_inputs),
    "rnn_softmax": (ops.rnn_softmax, loop_rnn_softmax, reference.rnn_softmax, rnn_softmax_inputs),
    "selective_scan": (
        ops.selective_scan,
        loop_selective_scan,
        reference.selective_scan,
        selective_scan_inputs,
    ),
    "linear_attention": (
        ops.linear_attention,
        ops.recurrent_linear_attention,
        reference.linear_attention,
        linear_inputs,
    ),
    "linear_attention, head decay": (
        ops.linear_attention,
        ops.recurrent_linear_attention,
        reference.linear_attention,
        head_decay_inputs,
    ),
    "linear_attention, channel decay": (
        ops.linear_attention,
        ops.recurrent_linear_attention,
        reference.linear_attention,
        channel_decay_inputs,
    ),
}


def check(name: str) -> None:
    op, _, oracle, make = CASES[name]
    inputs = make(1, 130)
    labels = [f"output {i}" for i in range(len(inputs) + 1)]
    actual, expected = (dict(zip(labels, step(f, inputs)(), strict=True)) for f in (op, oracle))
    gate(name, actual, expected, budget=12)


def measure(name: str, batch: int, time: int, rounds: int, *, compare: bool) -> dict[str, Any]:
    op, loop, _, make = CASES[name]
    inputs = make(batch, time)
    candidates: dict[str, Callable[[], Any]] = {"op": step(op, inputs)}
    if compare:
        candidates["loop"] = step(loop, inputs)
    if compare and name.startswith("linear"):
        candidates["softmax"] = step(softmax_attention, [*inputs[:2], inputs[2][..., :-1].contiguous()])
    median = interleave(candidates, rounds=rounds, warmup=1)
    return {
        "op": name,
        "B": batch,
        "T": time,
        "ms": 1e3 * median["op"],
        "us/token": 1e6 * median["op"] / (batch * time),
        "of loop": median["op"] / median["loop"] if "loop" in median else float("nan"),
        "of softmax": median["op"] / median["softmax"] if "softmax" in median else float("nan"),
        "bytes/token": peak_bytes(candidates["op"]) / (batch * time),
    }


def main() -> None:
    options = parse_options("recurrences", __doc__, rounds=5)
    torch.manual_seed(0)
    for name in CASES:
        check(name)
    rows = []
    for name in CASES:
        for batch, time in ((2, 1024), (1, 4096), (1, 16384)):
            long = time > 4096
            row = measure(
                name, batch, time, min(options.rounds, 3) if long else options.rounds, compare=not long
            )
            rows.append(row)
            print_table(rows[-1:])
    print()
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
