"""First-order linear recurrence over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import as_dtype, compute_dtype

CHUNK, WIDE_CHUNK = 32, 8
"""Steps of a chunk, a factor of the plain form's memory: of few channels, and of as many as a model is wide."""


def plain_scan(decay: Tensor, x: Tensor, state: Tensor | None = None, chunk: int = WIDE_CHUNK) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` of S signals that share their decays: ``B T C``, ``B T S C`` and ``B S C``."""
    if state is not None:
        first = torch.addcmul(x[:, :1], decay[:, :1].unsqueeze(2), state.unsqueeze(1))
        x = torch.cat([first, x[:, 1:]], dim=1)
    return from_zero(decay.mT, x.permute(0, 3, 1, 2), chunk).permute(0, 2, 3, 1)  # channels before time


def from_zero(decay: Tensor, x: Tensor, chunk: int) -> Tensor:
    """``h_t = a_t h_{t-1} + x_t`` of ``... T`` and ``... T S``, with 0 before the first: within chunks, then their ends
    as a sequence of its own. Eight times a chunk is not cut.

    The recurrence is a triangular system with ones on its diagonal and the decays below it: solving one subtracts
    nothing and divides by nothing.
    """
    steps, signals = x.shape[-2:]
    if steps <= 8 * chunk:
        return _solved(decay, x)
    if steps % chunk:
        decay, x = F.pad(decay, (0, -steps % chunk)), F.pad(x, (0, 0, 0, -steps % chunk))
    decay, x = decay.unflatten(-1, (-1, chunk)), x.unflatten(-2, (-1, chunk))
    one_before = F.pad(decay[..., :1], (0, chunk - 1)).unsqueeze(-1)  # what a 1 before the chunk adds to it
    solved = _solved(decay, torch.cat([x, one_before], dim=-1))
    within, since = solved.split([signals, 1], dim=-1)
    ends = from_zero(since[..., -1, 0], within[..., -1, :], chunk)
    before = F.pad(ends[..., :-1, :], (0, 0, 1, 0)).unsqueeze(-2)
    h = (within + since * before).flatten(-3, -2)
    return h[..., :steps, :] if steps % chunk else h


def _solved(decay: Tensor, x: Tensor) -> Tensor:
    system = torch.diag_embed(-decay[..., 1:], offset=-1)
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
        Time and memory ``O(B T C)``, of the plain form times 32, and times ``T`` up to 256; its number of operations
        grows with the logarithm of ``T`` to the base of 32 alone.
    """
    compute = compute_dtype(decay, x, state)
    state = None if state is None else state.to(compute)
    if x.shape[1] == 0:
        return x, _start(x, state, compute)
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    decay, x_wide = decay.to(compute), x.to(compute)
    if x.shape[1] == 1:  # a step of a stream
        h = torch.addcmul(x_wide, decay, _start(x, state, compute).unsqueeze(1))
        return h.to(x.dtype), h[:, 0]
    if kernels.usable("scan", decay, x_wide, state):
        h, last = torch.ops.helmholtz.scan(decay, x_wide, _start(x, state, compute), False)
        return h.to(x.dtype), last
    signal = None if state is None else state.unsqueeze(1)
    h = plain_scan(decay, x_wide.unsqueeze(2), signal, CHUNK).squeeze(2)
    return h.to(x.dtype), h[:, -1]


def _start(x: Tensor, state: Tensor | None, compute: torch.dtype) -> Tensor:
    return x.new_zeros((x.shape[0], x.shape[2]), dtype=compute) if state is None else state


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
    state = as_dtype(state, compute)
    if x.shape[1] and kernels.usable("scan", rate, x, state):
        halves = rate.dtype == x.dtype == torch.bfloat16 and compute == torch.float32
        stored = x.dtype if halves else compute
        inputs = as_dtype(rate, stored), as_dtype(x, stored)
        if reset is not None:
            inputs = inputs[0].masked_fill(reset.unsqueeze(-1), torch.inf), inputs[1]
        h, last = torch.ops.helmholtz.scan(*inputs, _start(x, state, compute), True)
        return as_dtype(h, x.dtype), last
    rate = rate.to(compute)  # a decay near 1 is not near 1 in bf16
    return first_order_scan(torch.sigmoid(-rate), x, state=state, reset=reset)
