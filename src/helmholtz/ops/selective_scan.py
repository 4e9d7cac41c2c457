"""The selective state-space recurrence: decay per channel and state, chosen by the input."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._recompute import recomputed

CHUNK, GROUP = 64, 8
"""Steps of a chunk, and of a group of them whose states are held at a time."""


def _plain(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One place after another of all chunks at once: from 0 for what a chunk adds to the state, then from the states
    before the chunks. Inside, states lie before channels: ``B n N S C``."""
    num_steps, length = u.shape[1], min(CHUNK, u.shape[1])
    rates, state = A.T, state.permute(0, 3, 1, 2)
    x, steps, b, c = (_chunks(z, length) for z in (u, delta, B, C))
    keep = None if reset is None else 1 - _chunks(reset.to(u.dtype), length)
    total = (steps.sum(2).unsqueeze(-2) * rates).exp()
    if keep is not None:
        total = total * keep.amin(2)[..., None, None]
    h = x.new_zeros(*x.shape[:2], *state.shape[1:])
    groups = range(0, length, GROUP)
    for i in groups:
        h = recomputed(_states, h, *_cut(i, x, steps, b, keep), rates)[0]
    h, last = _before_chunks(h, total.unsqueeze(3), state)
    read = []
    for i in groups:
        h, y = recomputed(_reads, h, *_cut(i, x, steps, b, keep), rates, c[:, :, i : i + GROUP])
        read.append(y)
    return torch.cat(read, 2).flatten(1, 2)[:, :num_steps], last.permute(0, 2, 3, 1)


def _chunks(x: Tensor, length: int) -> Tensor:
    """``B n L ...``, filled with zeros."""
    pad = x.new_zeros(x.shape[0], -x.shape[1] % length, *x.shape[2:])
    return torch.cat([x, pad], dim=1).unflatten(1, (-1, length))


def _cut(i: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[:, :, i : i + GROUP] for x in tensors)


def _states(
    h: Tensor, u: Tensor, delta: Tensor, b: Tensor, keep: Tensor | None, rates: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The state after a group of places, and after each."""
    decay = (delta.unsqueeze(3) * rates).exp()
    if keep is not None:
        decay = decay * keep[..., None, None]
    added = (u * delta.unsqueeze(3)).unsqueeze(3) * b[..., None, None]
    states = []
    for a, new in zip(decay.unsqueeze(4).unbind(2), added.unbind(2), strict=True):
        h = torch.addcmul(new, a, h)
        states.append(h)
    return h, states


def _reads(
    h: Tensor, u: Tensor, delta: Tensor, b: Tensor, keep: Tensor | None, rates: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """The state after a group of places, and what each reads, ``B n g S C``."""
    h, states = _states(h, u, delta, b, keep, rates)
    return h, (c.unsqueeze(3) @ torch.stack(states, 2).flatten(4)).view_as(u)


def _before_chunks(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    starts = []
    for a, new in zip(decay.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(new, a, state)
    return torch.stack(starts, 1), state


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
        Computed in at least float32, one step after another; no exponent is above 0.

    Cost:
        Time ``O(B T S C N)``. Memory ``O(B T S C)``: the kernel keeps a state every 32 steps, the plain form one per
        chunk of 64; others are recomputed.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.2.
    """
    compute = compute_dtype(u, delta, A, B, C, D, state)
    steps, rates, b, c = (z.to(compute) for z in (delta, A, B, C))
    if state is None:
        state = u.new_zeros((u.shape[0], *u.shape[2:], A.shape[1]), dtype=compute)
    if u.shape[1] == 0:
        return u, state.to(compute)
    skip = None if D is None else D.to(compute)
    if kernels.usable(u, steps, rates, b, c, skip, state, reset):
        x = (u if u.dtype == torch.bfloat16 and compute == torch.float32 else u.to(compute)).unsqueeze(3)
        scan = torch.ops.helmholtz.selective_scan
        y, last, _, _ = scan(x, steps, rates, b, c, skip, state.to(compute), reset, False)
        return y.squeeze(3).to(u.dtype), last
    x = u.to(compute)
    with full_precision(u.device):
        y, last = _plain(x, steps, rates, b, c, state.to(compute), reset)
    return (y if skip is None else torch.addcmul(y, skip, x)).to(u.dtype), last


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
    if state is None:
        state = u.new_zeros((len(u), u.shape[2] + 1, *A.shape), dtype=compute)
    x = u if u.dtype == torch.bfloat16 and compute == torch.float32 else u.to(compute)
    if kernels.usable(x, delta, A, B, C, D, state, reset) and u.shape[1]:
        rest = (z.to(compute) for z in (delta, A, B, C, D, state))
        y, last, _, _ = torch.ops.helmholtz.selective_scan(x, *rest, reset, True)
        return y, last
    x = u.to(compute).flatten(3)
    y, last = selective_scan(
        torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2), delta, A, B, C, D, state=state, reset=reset
    )
    return (y[:, :, :-1] / y[:, :, -1:]).unflatten(3, u.shape[3:]), last
