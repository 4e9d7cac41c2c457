"""First-order linear recurrence over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._recompute import recomputed


def doubling_scan(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` along dimension 1 from ``state``, in log2 T sweeps: after each a step has heard of
    twice as many. ``decay`` broadcasts against ``x`` after the time dimension.

    Source: Hillis & Steele, "Data Parallel Algorithms", 1986.
    """
    first = torch.addcmul(x[:, :1], decay[:, :1], state.unsqueeze(1))
    h, span = torch.cat([first, x[:, 1:]], dim=1), 1
    while span < x.shape[1]:
        h = torch.addcmul(h, decay, _later(h, span))
        decay = decay * _later(decay, span)
        span *= 2
    return h


def _later(x: Tensor, steps: int) -> Tensor:
    """``x`` that many steps later, 0 before."""
    return F.pad(x[:, :-steps], (0, 0) * (x.ndim - 2) + (steps, 0))


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
        Time and memory ``O(B T C)``; the plain form makes ``log2 T`` sweeps, and makes them again in backward.
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
    inputs = decay.to(compute), x.to(compute), state.to(compute)
    if kernels.usable(*inputs):
        h, last = torch.ops.helmholtz.scan(*inputs)
        return h.to(x.dtype), last
    h = recomputed(doubling_scan, *inputs)
    return h.to(x.dtype), h[:, -1]
