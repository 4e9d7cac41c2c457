"""First-order linear recurrence over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._chunks import decays_between
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
        h, last = torch.ops.helmholtz.scan(*inputs, False)
        return h.to(x.dtype), last
    h = recomputed(doubling_scan, *inputs)
    return h.to(x.dtype), h[:, -1]


CHUNK = 64


def leaky_scan(
    rate: Float[Tensor, "B T C"],
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    r"""Solve :math:`h_t = \sigma(-r_t)\, h_{t-1} + x_t` for all :math:`t`: ``first_order_scan`` with decays that are
    known by their logarithms, :math:`\log \sigma(-r) = -\mathrm{softplus}(r)`.

    Args:
        mask: where False, the state stays as it was.
        reset: where True, :math:`h_{t-1}` counts as 0.

    Returns, accuracy: as ``first_order_scan``. Log decays are only added, never subtracted.
    Cost: the plain form takes ``O(B T C chunk)`` time and memory, and computes again in backward; its number of
        operations grows with the logarithm of ``T`` to the base of the chunk alone.
    Reference: ``helmholtz.reference.leaky_scan``.
    """
    if mask is not None:
        rate, x = rate.masked_fill(~mask.unsqueeze(-1), -torch.inf), x.masked_fill(~mask.unsqueeze(-1), 0)
    compute = compute_dtype(rate, x, state)
    start = x.new_zeros((x.shape[0], x.shape[2]), dtype=compute) if state is None else state.to(compute)
    if x.shape[1] == 0:
        return x, start
    if kernels.usable(rate, x, start):
        halves = rate.dtype == x.dtype == torch.bfloat16 and compute == torch.float32
        inputs = (rate, x) if halves else (rate.to(compute), x.to(compute))
        if reset is not None:
            inputs = inputs[0].masked_fill(reset.unsqueeze(-1), torch.inf), inputs[1]
        h, last = torch.ops.helmholtz.scan(*inputs, start, True)
        return h.to(x.dtype), last
    rate = rate.to(compute)  # a decay near 1 is not near 1 in bf16
    if x.shape[1] == 1:
        return first_order_scan(torch.sigmoid(-rate), x, state=start, reset=reset)
    log_decay = F.logsigmoid(-rate)
    if reset is not None:
        log_decay = log_decay.masked_fill(reset.unsqueeze(-1), -torch.inf)
    h = recomputed(_chunked_scan, log_decay, x.to(compute), start)
    return h.to(x.dtype), h[:, -1]


def _chunked_scan(log_decay: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """``h`` of all steps: products with the decays between the steps of a chunk, and the same scan over chunks."""
    steps = x.shape[1]
    length = min(CHUNK, steps)
    pad = (0, 0, 0, -steps % length)
    log_decay, x = (F.pad(y, pad).unflatten(1, (-1, length)).mT for y in (log_decay, x))  # B n C L
    within = (decays_between(log_decay) * x.unsqueeze(-2)).sum(-1)
    since = log_decay.cumsum(-1)
    starts = start.unsqueeze(1)
    if steps > length:
        ends = _chunked_scan(since[..., -1], within[..., -1], start)
        starts = torch.cat([starts, ends[:, :-1]], dim=1)
    return torch.addcmul(within, since.exp(), starts.unsqueeze(-1)).mT.flatten(1, 2)[:, :steps]
