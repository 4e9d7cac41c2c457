"""First-order linear recurrence over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import as_dtype, compute_dtype

CHUNK = 16
"""Steps of a chunk; four times as many are not cut into chunks."""


def plain_scan(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` of S signals that share their decays: ``B T C``, ``B T S C`` and ``B S C``.

    The recurrence is a triangular system with ones on its diagonal and the decays below it: solving one subtracts
    nothing and divides by nothing.
    """
    h = states(decay.mT, x.permute(0, 3, 1, 2), state.mT)  # channels before time
    return h[..., 1:, :].permute(0, 2, 3, 1)


def states(decay: Tensor, x: Tensor, state: Tensor, chunk: int = CHUNK) -> Tensor:
    """``state`` and what it is after each step, of ``... T``, ``... T S`` and ``... S``: chunks from 0, then their ends
    as a sequence of its own."""
    steps = x.shape[-2]
    if steps <= 4 * chunk:
        return _solved(decay, torch.cat([state.unsqueeze(-2), x], dim=-2))
    if steps % chunk:
        decay, x = F.pad(decay, (0, -steps % chunk)), F.pad(x, (0, 0, 0, -steps % chunk))
    decay, x = decay.unflatten(-1, (-1, chunk)), x.unflatten(-2, (-1, chunk))
    unit = torch.eye(chunk + 1, 1, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], -1, -1)
    solved = _solved(decay, torch.cat([F.pad(x, (0, 0, 1, 0)), unit], dim=-1))[..., 1:, :]
    within, since = solved.split([x.shape[-1], 1], dim=-1)
    starts = states(since[..., -1, 0], within[..., -1, :], state, chunk)[..., :-1, :]
    h = torch.addcmul(within, since, starts.unsqueeze(-2)).flatten(-3, -2)
    return torch.cat([state.unsqueeze(-2), h[..., :steps, :]], dim=-2)


def _solved(decay: Tensor, x: Tensor) -> Tensor:
    """``x`` has one step more, the first, than there are decays."""
    system = torch.diag_embed(-decay, offset=-1)
    return torch.linalg.solve_triangular(system, x, upper=False, unitriangular=True)


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
        Time and memory ``O(B T C)``, of the plain form times 16; its number of operations grows with the logarithm
        of ``T`` to that base alone.
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
    decay, x_wide, state = inputs
    h = plain_scan(decay, x_wide.unsqueeze(2), state.unsqueeze(1)).squeeze(2)
    return h.to(x.dtype), h[:, -1]


def leaky_scan(
    rate: Float[Tensor, "B T C"],
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    r"""Solve :math:`h_t = \sigma(-r_t)\, h_{t-1} + x_t` for all :math:`t`: ``first_order_scan`` with the decays
    of the conditioning.

    Args:
        mask: where False, the state stays as it was.
        reset: where True, :math:`h_{t-1}` counts as 0.

    Returns, accuracy, cost: as ``first_order_scan``; decays are made in the compute dtype.
    Reference: ``helmholtz.reference.leaky_scan``.
    """
    if mask is not None:
        rate, x = rate.masked_fill(~mask.unsqueeze(-1), -torch.inf), x.masked_fill(~mask.unsqueeze(-1), 0)
    compute = compute_dtype(rate, x, state)
    if state is None:
        state = x.new_zeros((x.shape[0], x.shape[2]), dtype=compute)
    start = as_dtype(state, compute)
    if x.shape[1] == 0:
        return x, start
    if kernels.usable(rate, x, start):
        halves = rate.dtype == x.dtype == torch.bfloat16 and compute == torch.float32
        stored = x.dtype if halves else compute
        inputs = as_dtype(rate, stored), as_dtype(x, stored)
        if reset is not None:
            inputs = inputs[0].masked_fill(reset.unsqueeze(-1), torch.inf), inputs[1]
        h, last = torch.ops.helmholtz.scan(*inputs, start, True)
        return as_dtype(h, x.dtype), last
    rate = rate.to(compute)  # a decay near 1 is not near 1 in bf16
    return first_order_scan(torch.sigmoid(-rate), x, state=start, reset=reset)
