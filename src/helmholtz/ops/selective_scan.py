"""The selective state-space recurrence: decay per channel and state, chosen by the input."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import compute_dtype, full_precision

# Inside: time first, then B N S C (states before channels): every step is one pass over contiguous rows,
# and both contractions over N are matrix products.


def _decays(delta: Tensor, A: Tensor, keep: Tensor | None) -> Tensor:
    """``e^{delta A}`` as ``L B N 1 C``; 0 where the sequence restarts."""
    decay = torch.mul(delta[:, :, None, None], A[:, None]).exp_()
    return decay if keep is None else decay.mul_(keep)


def _states(decay: Tensor, du: Tensor, B: Tensor, start: Tensor) -> Tensor:
    """``h`` at every step of a chunk, ``L B N S C``."""
    h = du.unsqueeze(2) * B[..., None, None]
    for a, row in zip(decay.unbind(0), h.unbind(0), strict=True):
        start = row.addcmul_(a, start)
    return h


def _over_signals(x: Tensor, y: Tensor) -> Tensor:
    """``sum_s x y`` of two ``L B N S C``."""
    total = x[..., 0, :] * y[..., 0, :]
    for s in range(1, x.shape[-2]):
        total.addcmul_(x[..., s, :], y[..., s, :])
    return total


class _SelectiveScan(DifferentiableOnce):
    """Keeps the state at chunk boundaries and recomputes inside the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        keep: Tensor | None,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(u)
        starts = []
        with full_precision(u.device):
            for i in range(0, u.shape[0], length):
                span = slice(i, i + length)
                starts.append(state)
                decay = _decays(delta[span], A, None if keep is None else keep[span])
                h = _states(decay, u[span] * delta[span].unsqueeze(2), B[span], state)
                torch.matmul(C[span].unsqueeze(2), h.flatten(3), out=y[span].flatten(2).unsqueeze(2))
                state = h[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, keep, *starts)
        ctx.length = length
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, keep, *starts = ctx.saved_tensors
        du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
        dA = torch.zeros_like(A)
        dy = dy.contiguous()
        with full_precision(u.device):
            for i, start in zip(range(0, u.shape[0], ctx.length)[::-1], starts[::-1], strict=True):
                span = slice(i, i + ctx.length)
                inputs = (u[span], delta[span], A, B[span], C[span])
                gradients = (du[span], ddelta[span], dA, dB[span], dC[span])
                kept = None if keep is None else keep[span]
                dstate = _chunk_backward(inputs, start, kept, dy[span], dstate, gradients)
        return du, ddelta, dA, dB, dC, dstate, None, None


def _chunk_backward(
    inputs: tuple[Tensor, ...],
    start: Tensor,
    keep: Tensor | None,
    dy: Tensor,
    dstate: Tensor,
    gradients: tuple[Tensor, ...],
) -> Tensor:
    """Write one chunk's gradients of ``inputs`` (that of ``A`` adds up); returns that of its first state."""
    (u, delta, A, B, C), (du, ddelta, dA, dB, dC) = inputs, gradients
    decay = _decays(delta, A, keep)
    scaled = u * delta.unsqueeze(2)
    h = _states(decay, scaled, B, start)
    torch.matmul(h.flatten(3), dy.flatten(2).unsqueeze(3), out=dC.unsqueeze(3))
    dh = dy.unsqueeze(2) * C[..., None, None]
    dh[-1] += dstate
    rows = dh.unbind(0)
    for now, after, a in zip(rows[-2::-1], rows[:0:-1], decay.unbind(0)[:0:-1], strict=True):
        now.addcmul_(a, after)
    torch.matmul(dh.flatten(3), scaled.flatten(2).unsqueeze(3), out=dB.unsqueeze(3))
    dscaled = torch.matmul(B.unsqueeze(2), dh.flatten(3)).view_as(u)
    torch.mul(dscaled, delta.unsqueeze(2), out=du)
    torch.mul(dscaled, u, out=dscaled)
    exponent = torch.empty_like(decay.squeeze(3))
    exponent[1:] = _over_signals(dh[1:], h[:-1])
    exponent[0] = _over_signals(dh[:1], start.unsqueeze(0)).squeeze(0)
    exponent *= decay.squeeze(3)
    dA += (exponent * delta.unsqueeze(2)).sum((0, 1))
    torch.sum(dscaled, dim=2, out=ddelta)
    ddelta += exponent.mul_(A).sum(2)
    return decay[0] * dh[0]


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
        Time ``O(B T S C N)``. Memory ``O(B T S C)``: states are kept every 32 steps and recomputed.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.2.
    """
    compute = compute_dtype(u, delta, A, B, C, D, state)
    x, steps, rates, b, c = (z.to(compute) for z in (u, delta, A, B, C))
    if state is None:
        state = u.new_zeros((u.shape[0], *u.shape[2:], A.shape[1]), dtype=compute)
    if u.shape[1] == 0:
        return u, state.to(compute)
    keep = None if reset is None else (~reset).to(compute).T[:, :, None, None, None]
    x, steps, b, c = (z.transpose(0, 1).contiguous() for z in (x, steps, b, c))
    start = state.to(compute).permute(0, 3, 1, 2).contiguous()
    y, last = _SelectiveScan.call(x, steps, rates.T.contiguous(), b, c, start, keep, 32)
    y = y.transpose(0, 1)
    if D is not None:
        y = y + D.to(compute) * u.to(compute)
    return y.to(u.dtype), last.permute(0, 2, 3, 1)
