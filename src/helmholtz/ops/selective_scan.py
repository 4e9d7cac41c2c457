"""The selective state-space recurrence: decay per channel and state, chosen by the input."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._chunks import carry
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._recompute import recomputed

CHUNK, GROUP = 64, 16
"""Steps of a chunk, and of a group of them whose states are held at a time."""


def _plain(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One place after another of all chunks at once, from 0; what is left of the states before the chunks is added.
    Inside, states lie before channels: ``B n N S C``."""
    (batch, num_steps, signals, channels), states = u.shape, A.shape[1]
    length = min(CHUNK, num_steps)
    added, steps, b, c = (_chunks(z, length) for z in (u * delta.unsqueeze(2), delta, B, C))
    passed = steps.cumsum(2)
    fresh = None if reset is None else _chunks(reset, length)
    forgotten = None if fresh is None else fresh.cumsum(2) > 0
    h, read = u.new_zeros(batch, steps.shape[1], states, signals, channels), []
    parts = [z.split(GROUP, 2) for z in (steps, added, b, c)]
    restarts = [None] * len(parts[0]) if fresh is None else fresh.split(GROUP, 2)
    for group in zip(*parts, restarts, strict=True):
        h, y = recomputed(_group, h, A.T, *group)
        read.append(y)
    ends = h.permute(0, 1, 4, 2, 3).flatten(2, 3).unsqueeze(1)
    total = (passed[:, :, -1].unsqueeze(3) * A).exp()
    if forgotten is not None:
        total = total.masked_fill(forgotten[:, :, -1, None, None], 0)
    start = None if state is None else state.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)
    starts, last = carry(ends, total.flatten(2).unsqueeze(1), start)
    starts = starts.view(-1, states, signals)
    halves = zip(
        passed.split(CHUNK // 2, 2), c.split(CHUNK // 2, 2), strict=True
    )  # each a number per step and state
    left = torch.cat([recomputed(_read_before, half, A, by, starts) for half, by in halves], 2)
    left = left if forgotten is None else left.masked_fill(forgotten[..., None, None], 0)
    y = (torch.cat(read, 2) + left).flatten(1, 2)
    last = last.view(batch, channels, states, signals).permute(0, 3, 1, 2)
    return (y[:, :num_steps] if num_steps % length else y), last


def _chunks(x: Tensor, length: int) -> Tensor:
    """``B n L ...``, filled with zeros."""
    if x.shape[1] % length:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % length))
    return x.unflatten(1, (-1, length))


def _group(
    h: Tensor, rates: Tensor, steps: Tensor, added: Tensor, b: Tensor, c: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state after a group of places from that before it, and what each reads, ``B n g S C``."""
    new = added.unsqueeze(3) * b[..., None, None]
    decay = (steps.unsqueeze(3) * rates).exp()
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    decays, states = decay.unsqueeze(4).expand_as(new).unbind(2), []
    for a, x in zip(decays, new.unbind(2), strict=True):
        h = a * h + x
        states.append(h)
    rows = torch.stack(states, 2).flatten(0, 2).flatten(2)
    return h, torch.bmm(c.reshape(len(rows), 1, -1), rows).view_as(added)


def _read_before(passed: Tensor, A: Tensor, c: Tensor, starts: Tensor) -> Tensor:
    """What each place of a chunk reads of the states before it, ``B n L S C``; those are ``(B n C) N S``."""
    batch, chunks, length, channels = passed.shape
    reads = (passed.mT.unsqueeze(-1) * A.unsqueeze(1)).exp() * c.unsqueeze(2)
    y = torch.bmm(reads.flatten(0, 2), starts)
    return y.view(batch, chunks, channels, length, -1).permute(0, 1, 3, 4, 2)


def selective_scan(
    u: Float[Tensor, "B T S C"],
    delta: Float[Tensor, "B T C"],
    A: Float[Tensor, "C N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "C"] | None = None,
    *,
    state: Float[Tensor, "B S C N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S C"], Float[Tensor, "B S C N"]]:
    r"""Scan every signal through a diagonal state space whose step, input and output follow the input.

    .. math:: h_t = e^{\Delta_t A}\, h_{t-1} + \Delta_t B_t u_t, \qquad y_t = C_t \cdot h_t + D u_t

    Args:
        u: S signals that share the dynamics.
        delta: step sizes, at least 0. 0 is a pad: the state passes through and takes no input.
        A: rates, at most 0.
        state: :math:`h_{-1}`; zeros by default.
        reset: where True, :math:`h_{t-1}` counts as 0.

    Returns:
        ``(y, last)``; ``last`` is the state after the last step in the compute dtype.

    Accuracy:
        Computed in at least float32; no exponent is above 0, none is a difference of sums.

    Cost:
        Time ``O(B T S C N)``. Memory ``O(B T S C)`` of the kernel, which keeps a state every 32 steps. The plain form
        keeps a state every 16 steps; others are recomputed.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.2.
    """
    compute = compute_dtype(u, delta, A, B, C, D, state)
    steps, rates, b, c = (z.to(compute) for z in (delta, A, B, C))
    state = None if state is None else state.to(compute)
    if u.shape[1] == 0:
        return u, _start(u, rates, state)
    skip = None if D is None else D.to(compute)
    if kernels.usable("selective_scan", u, steps, rates, b, c, skip, state, reset):
        x = (u if u.dtype == torch.bfloat16 and compute == torch.float32 else u.to(compute)).unsqueeze(3)
        scan = torch.ops.helmholtz.selective_scan
        y, last, _, _ = scan(x, steps, rates, b, c, skip, _start(u, rates, state), reset, False)
        return y.squeeze(3).to(u.dtype), last
    x = u.to(compute)
    with full_precision(u.device):
        y, last = _plain(x, steps, rates, b, c, state, reset)
    return (y if skip is None else torch.addcmul(y, skip, x)).to(u.dtype), last


def _start(u: Tensor, rates: Tensor, state: Tensor | None) -> Tensor:
    return rates.new_zeros(len(u), u.shape[2], *rates.shape) if state is None else state


def selective_average(
    u: Float[Tensor, "B T S H V"],
    delta: Float[Tensor, "B T C"],
    A: Float[Tensor, "C N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "C"],
    *,
    state: Float[Tensor, "B S1 C N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S H V"], Float[Tensor, "B S1 C N"]]:
    """`selective_scan` of S signals over that of ones, the last of the state; channels are those of H heads.

    A distribution's averages where B, C and D are positive.

    Returns: ``(averages, last)`` in the compute dtype.
    Cost: the kernel makes no signal of ones and divides as it scans, and reads bfloat16 as it is.
    """
    compute = compute_dtype(u, delta, A, B, C, D, state)
    x = u if u.dtype == torch.bfloat16 and compute == torch.float32 else u.to(compute)
    if kernels.usable("selective_scan", x, delta, A, B, C, D, state, reset) and u.shape[1]:
        if state is None:
            state = u.new_zeros((len(u), u.shape[2] + 1, *A.shape), dtype=compute)
        rest = (z.to(compute) for z in (delta, A, B, C, D, state))
        y, last, _, _ = torch.ops.helmholtz.selective_scan(x, *rest, reset, True)
        return y, last
    x = u.to(compute).flatten(3)
    y, last = selective_scan(
        torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2), delta, A, B, C, D, state=state, reset=reset
    )
    averaged, mass = y.split([u.shape[2], 1], dim=2)
    return (averaged / mass).unflatten(3, u.shape[3:]), last
