"""State-space duality: a matrix-valued state with one decay per head, chosen by the input, as matrix products."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check
from helmholtz.ops._chunks import chunked_sums
from helmholtz.ops._compute import compute_dtype


def _step(
    x: Tensor,
    delta: Tensor,
    steps: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """One token of a stream, in torch's operations."""
    u = (x * delta.unsqueeze(-1)).squeeze(1).unsqueeze(-1)
    past = steps.exp().view(*u.shape[:2], 1, 1) * state
    state = torch.addcmul(past, u, B.unsqueeze(2))
    y = ((past if strict else state) @ C.unsqueeze(3)).view_as(x)
    return torch.addcmul(y, x, D.unsqueeze(-1)), state


def ssd(
    x: Float[Tensor, "B T H P"],
    delta: Float[Tensor, "B T H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "H"] | None = None,
    *,
    gate: Float[Tensor, "B T H P"] | None = None,
    state: Float[Tensor, "B H P N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    strict: bool = False,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    r"""Scan a state-space model whose heads decay as a whole: Mamba-2's form of `selective_scan`.

    .. math:: h_t = e^{\Delta_t A}\, h_{t-1} + \Delta_t x_t B_t^\top, \qquad y_t = h_t C_t + D x_t

    Args:
        delta: step sizes, at least 0. 0 is a pad: the state passes through and takes no input.
        A: rates, at most 0.
        B: what a step writes; one for all heads, as C, what it reads.
        gate: multiplies y as :math:`\mathrm{silu}(\text{gate})`.
        state: :math:`h_{-1}`; zeros by default.
        reset: where True, :math:`h_{t-1}` counts as 0.
        strict: let :math:`y_t` read :math:`e^{\Delta_t A}\, h_{t-1}` in place of :math:`h_t`: the past alone.
        chunk: steps per matrix product; a matter of speed and memory.

    Returns:
        ``(y, last)``; ``last`` is the state after the last step in the compute dtype.

    Accuracy:
        Computed in at least float32, also under autocast. No exponent is above 0 and none is a difference of sums,
        so neither ``e^{-\Delta A T}`` overflows nor does a strong decay blur the weak ones after it.

    Cost:
        Time ``O(B T H (chunk + N) P)``. Memory ``O(B T H (chunk + N + P))`` plus one state per chunk.

    Source: Dao & Gu, "Transformers are SSMs", 2024, section 6.
    """
    check(chunk >= 1, "chunk", chunk, "an integer of at least 1")
    compute = compute_dtype(x, delta, A, B, C, D, state)
    batch, num_steps, heads, width = x.shape
    if state is None:
        state = x.new_zeros((batch, heads, width, B.shape[2]), dtype=compute)
    if x.numel() == 0:
        return x, state.to(compute)
    if num_steps == 1 and reset is None and _has_kernel(x, compute, state):
        y, last = torch.ops.helmholtz.ssd_step(x, delta, A, B, C, D, gate, state, strict)
        return y, last
    u, step_sizes, b, c = (z.to(compute) for z in (x, delta, B, C))
    skip = u.new_zeros(heads) if D is None else D.to(compute)
    steps = step_sizes * A.to(compute)
    if reset is not None:
        steps = steps.masked_fill(reset.unsqueeze(-1), -torch.inf)
    if num_steps == 1:
        y, last = _step(u, step_sizes, steps, b, c, skip, state.to(compute), strict)
        return _gated(y, gate, x), last
    y, last = chunked_sums(
        c.unsqueeze(1),
        b.unsqueeze(1),
        (u * step_sizes.unsqueeze(-1)).transpose(1, 2),
        steps.transpose(1, 2).unsqueeze(-1),
        state.to(compute).mT,
        chunk=chunk,
        strict=strict,
    )
    return _gated(torch.addcmul(y.transpose(1, 2), u, skip.unsqueeze(-1)), gate, x), last.mT


def _gated(y: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
    y = y.to(x.dtype)
    return y if gate is None else y * F.silu(gate)


def _has_kernel(x: Tensor, compute: torch.dtype, state: Tensor) -> bool:
    """It has no derivative: it is of streams."""
    known = x.dtype in kernels.STORED and compute == compute_dtype(x)
    return known and not torch.is_grad_enabled() and kernels.usable("ssd_step", x, state)
