"""First-order linear recurrence over time."""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import compute_dtype

# One step on this many elements costs as much as its launch; wider rows gain nothing from chunks.
_WIDE_ROW = 2048


def _steps(decay: Tensor, x: Tensor, carry: Tensor, *, reverse: bool) -> Tensor:
    """``x_t += decay_t x_{t-1}`` in place, one step after another; returns the last row."""
    rows = list(zip(decay.unbind(1), x.unbind(1), strict=True))
    for a, row in reversed(rows) if reverse else rows:
        carry = row.addcmul_(a, carry)
    return carry


def _chunks(decay: Tensor, x: Tensor, carry: Tensor, length: int, *, reverse: bool) -> Tensor:
    """As `_steps`, all chunks of ``length`` steps side by side, then over the chunks' ends."""
    decay = decay.unflatten(1, (-1, length)).clone()
    x = x.unflatten(1, (-1, length))
    order = range(length)[::-1] if reverse else range(length)
    decays, rows = decay.unbind(2), x.unbind(2)
    for before, now in pairwise(order):
        rows[now].addcmul_(decays[now], rows[before])
        decays[now].mul_(decays[before])  # decay since the chunk's start
    carries = []
    ends = list(zip(decays[order[-1]].unbind(1), rows[order[-1]].unbind(1), strict=True))
    for a, end in reversed(ends) if reverse else ends:
        carries.append(carry)
        carry = torch.addcmul(end, a, carry)
    x.addcmul_(decay, torch.stack(carries[::-1] if reverse else carries, dim=1).unsqueeze(2))
    return carry


def scan_in_place(decay: Tensor, x: Tensor, carry: Tensor, *, reverse: bool = False) -> Tensor:
    """``x_t += decay_t x_{t-1}`` along dimension 1, starting from ``carry``; returns the last row.

    ``decay`` broadcasts against ``x`` after the time dimension; ``reverse`` starts at the last step.
    """
    num_steps, width = x.shape[1], math.prod(x.shape[2:]) * x.shape[0]
    length = min(math.isqrt(num_steps), 64)  # longer products of decays would often run into denormals
    if length < 4 or width >= _WIDE_ROW:
        return _steps(decay, x, carry, reverse=reverse)
    body = num_steps - num_steps % length
    head, tail = (decay[:, :body], x[:, :body]), (decay[:, body:], x[:, body:])
    if reverse:
        return _chunks(*head, _steps(*tail, carry, reverse=True), length, reverse=True)
    return _steps(*tail, _chunks(*head, carry, length, reverse=False), reverse=False)


class _Scan(DifferentiableOnce):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = x.clone(memory_format=torch.contiguous_format)
        last = scan_in_place(decay, h, state).clone()
        ctx.save_for_backward(decay, h, state)
        return h, last

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, h, state = ctx.saved_tensors
        dx = dh.clone(memory_format=torch.contiguous_format)
        dx[:, -1] += dlast
        scan_in_place(decay[:, 1:], dx[:, :-1], dx[:, -1], reverse=True)
        ddecay = torch.empty_like(dx)
        torch.mul(dx[:, 1:], h[:, :-1], out=ddecay[:, 1:])
        torch.mul(dx[:, 0], state, out=ddecay[:, 0])
        return ddecay, dx, dx[:, 0] * decay[:, 0]


def first_order_scan(
    decay: Float[Tensor, "B T C"],
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    r"""Solve :math:`h_t = a_t h_{t-1} + x_t` for all :math:`t`.

    Args:
        decay: :math:`a_t` in ``[0, 1]``, given as a factor; 0 forgets, 1 keeps.
        state: :math:`h_{-1}`; zeros by default.
        reset: where True, :math:`h_{t-1}` counts as 0.

    Returns:
        ``(h, last)``; ``last`` is ``h`` at the last step in the compute dtype (``state`` when ``T = 0``).

    Accuracy:
        Computed in at least float32. Decays are only ever multiplied, never divided by or exponentiated:
        an underflowing product is a forgotten past, not an error.

    Cost:
        Time and memory ``O(B T C)``. Narrow rows run as about ``sqrt(2 T)`` chunks side by side.
    """
    compute = compute_dtype(decay, x, state)
    if state is None:
        state = x.new_zeros((x.shape[0], x.shape[2]), dtype=compute)
    if x.shape[1] == 0:
        return x, state.to(compute)
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    if x.shape[1] == 1:  # a step of a stream
        h = torch.addcmul(x.to(compute), decay.to(compute), state.to(compute).unsqueeze(1))
        return h.to(x.dtype), h[:, 0]
    h, last = _Scan.call(decay.to(compute), x.to(compute), state.to(compute))
    return h.to(x.dtype), last
