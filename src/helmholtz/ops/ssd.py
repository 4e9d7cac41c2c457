"""State-space duality: a matrix-valued state with one decay per head, chosen by the input, as matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._checks import check
from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import beside_the_graph, compute_dtype, full_precision

# Shapes: G chunks of L steps are a span, worked on at once; K = B G, R = B G H rows. Log decays are only added, never
# subtracted: for i right and j left of a midpoint the decay from j to i is since_i + until_j, both at most 0, and
# halving again and again covers every pair i > j.

_SPAN = 2**20
"""Decays between steps that are held at a time."""


def _spans(x: Tensor, chunk: int) -> list[tuple[slice, int]]:
    """``(steps, length of their chunks)`` of ``x: B T H P``: whole chunks, then one for what is left."""
    batch, num_steps, heads, _ = x.shape
    group = chunk * max(1, _SPAN // max(1, batch * heads * chunk * chunk))
    whole = num_steps - num_steps % chunk
    spans = [(slice(i, min(i + group, whole)), chunk) for i in range(0, whole, group)]
    return spans + [(slice(whole, num_steps), num_steps - whole)] * (whole < num_steps)


def _blocks(x: Tensor, half: int) -> Tensor:
    """The blocks ``R blocks m m`` of ``x: R L L`` with ``i`` in right and ``j`` in left halves of ``m`` steps."""
    halves = x.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))
    return halves[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _decays(steps: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Factors between the steps of chunks whose log decays are ``steps: R L``.

    ``from j to i: R L L`` (0 for ``i < j``, and for ``i = j`` if ``strict``), from the start up to ``i`` and from ``j``
    to the end, ``R L 1``.
    """
    length = steps.shape[1]
    since = F.pad(steps, (0, (1 << (length - 1).bit_length()) - length))
    until = torch.zeros_like(since)
    weights = since.new_zeros(len(since), since.shape[1], since.shape[1])
    if not strict:
        weights.diagonal(dim1=1, dim2=2).fill_(1)
    half = 1
    while half < since.shape[1]:
        left, right = since.unflatten(1, (-1, 2, half)).unbind(2)
        before, _ = until.unflatten(1, (-1, 2, half)).unbind(2)
        torch.mul(right.exp().unsqueeze(-1), before.exp().unsqueeze(-2), out=_blocks(weights, half))
        before += right[..., -1:]
        right += left[..., -1:]
        half *= 2
    since, until = (z[:, :length].exp().unsqueeze(-1) for z in (since, until))
    return weights[:, :length, :length], since, until


def _chunks(x: Tensor, t: slice, length: int) -> Tensor:
    """The steps ``t`` of ``x: B T ...`` as a view ``B G L ...``."""
    return x[:, t].unflatten(1, (-1, length))


def _rows(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """``B G L H P``, times ``scale: B G L H``, as contiguous ``R L P``."""
    x = x.transpose(2, 3)
    out = x.new_empty(x.shape)
    if scale is None:
        out.copy_(x)
    else:
        torch.mul(x, scale.transpose(2, 3).unsqueeze(-1), out=out)
    return out.flatten(0, 2)


def _by_head(rows: Tensor, like: Tensor) -> Tensor:
    """``R L ...`` as a view ``B G L H ...``: the inverse of ``_rows``."""
    return rows.unflatten(0, (*like.shape[:2], like.shape[3])).transpose(2, 3)


def _per_head(x: Tensor, factor: Tensor) -> Tensor:
    """``x: K L N``, the same for all heads, times ``factor: R L 1``: ``R L N``."""
    return (x.unsqueeze(1) * factor.unflatten(0, (len(x), -1))).flatten(0, 1)


def _over_heads(x: Tensor, groups: int) -> Tensor:
    """Sum of ``R ...`` over the heads: ``K ...``."""
    return x.unflatten(0, (groups, -1)).sum(1)


def _scores(weights: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``weights (C_i . B_j)``: the product once, for all heads."""
    return (weights.unflatten(0, (len(B), -1)) * (C @ B.mT).unsqueeze(1)).flatten(0, 1)


def _carry(decay: Tensor, added: Tensor, state: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """``state`` before each chunk, ``R P N``, and after the last, where each makes it ``decay state + added``.

    ``reverse`` starts with the last chunk.
    """
    shape = (len(state), -1, state.shape[1])
    starts, decays, rows = (z.unflatten(0, shape) for z in (torch.empty_like(added), decay, added))
    order = range(rows.shape[1])
    for g in reversed(order) if reverse else order:
        starts[:, g] = state
        state = torch.addcmul(rows[:, g], decays[:, g], state)
    return starts.flatten(0, 2), state


class _Chunked(DifferentiableOnce):
    """Span after span; keeps the state before each chunk and recomputes everything else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        steps: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor,
        chunk: int,
        strict: bool,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        all_starts, first = [], state
        with full_precision(x.device):
            for t, length in _spans(x, chunk):
                u, delta_t, log_decay, b, c = (_chunks(z, t, length) for z in (x, delta, steps, B, C))
                weights, since, until = _decays(_rows(log_decay.unsqueeze(-1)).squeeze(-1), strict)
                b, c, rows = b.flatten(0, 1), c.flatten(0, 1), _rows(u, delta_t)
                added = torch.bmm(rows.mT, _per_head(b, until))
                starts, state = _carry(since[:, -1:], added, state)
                out = torch.bmm(_scores(weights, b, c), rows).baddbmm_(_per_head(c, since), starts.mT)
                torch.addcmul(_by_head(out, u), u, D.unsqueeze(-1), out=_chunks(y, t, length))
                all_starts.append(starts)
        ctx.save_for_backward(x, delta, steps, B, C, D, first, *all_starts)
        ctx.chunk, ctx.strict = chunk, strict
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, steps, B, C, D, _, *all_starts = ctx.saved_tensors
        gradients = [torch.empty_like(z) for z in (x, delta, steps, B, C)]
        dD = torch.zeros_like(D)
        with full_precision(x.device):
            for (t, length), starts in zip(_spans(x, ctx.chunk)[::-1], all_starts[::-1], strict=True):
                span = [_chunks(z, t, length) for z in (x, delta, steps, B, C)]
                dspan = [_chunks(z, t, length) for z in gradients]
                dstate = _span_backward(
                    span, dspan, D, dD, starts, _chunks(dy, t, length), dstate, ctx.strict
                )
        return *gradients, dD, dstate, None, None


def _span_backward(
    span: list[Tensor],
    gradients: list[Tensor],
    D: Tensor,
    dD: Tensor,
    starts: Tensor,
    dy: Tensor,
    dstate: Tensor,
    strict: bool,
) -> Tensor:
    """Write a span's gradients of ``x, delta, steps, B, C``, add that of D; returns that of the state before it."""
    (x, delta, steps, B, C), (dx, ddelta, dsteps, dB, dC) = span, gradients
    weights, since, until = _decays(_rows(steps.unsqueeze(-1)).squeeze(-1), strict)
    b, c, u, dout = B.flatten(0, 1), C.flatten(0, 1), _rows(x, delta), _rows(dy)
    scores, read, write = _scores(weights, b, c), _per_head(c, since), _per_head(b, until)
    ends, dstate = _carry(since[:, -1:], torch.bmm(dout.mT, read), dstate, reverse=True)
    dscores, dread, dwrite = torch.bmm(dout, u.mT), torch.bmm(dout, starts), torch.bmm(u, ends)
    du = _by_head(torch.bmm(scores.mT, dout).baddbmm_(write, ends.mT), x)
    # a step's decay acts on the pairs i >= t > j; summed over those alone, its gradient has no cancellation
    crossing, before = scores.mul_(dscores), torch.ones_like(weights[0]).triu_(1)
    dlog = (crossing.flatten(0, 1) @ before).view_as(crossing).tril_().sum(1)
    from_past, to_future = (read * dread).sum(-1), (write * dwrite).sum(-1)
    dlog += from_past @ before.mT + from_past + to_future @ before
    dlog += (starts * ends).sum((1, 2)).unsqueeze(-1) * since[:, -1]
    dsteps.copy_(_by_head(dlog, x))
    dproducts = _over_heads(dscores.mul_(weights), len(b))
    dC.copy_(torch.baddbmm(_over_heads(dread * since, len(b)), dproducts, b).view_as(dC))
    dB.copy_(torch.baddbmm(_over_heads(dwrite * until, len(b)), dproducts.mT, c).view_as(dB))
    torch.mul(dy, D.unsqueeze(-1), out=dx).addcmul_(du, delta.unsqueeze(-1))
    torch.sum(du.mul_(x), dim=-1, out=ddelta)
    dD += _by_head(dout, x).mul_(x).sum((0, 1, 2, 4))
    return dstate


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
    """One token of a stream."""
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
        Time ``O(B T H (chunk + N) P)``. Memory ``O(B T H P)`` plus one state per chunk; the scores of a chunk are
        recomputed in backward.

    Source: Dao & Gu, "Transformers are SSMs", 2024, section 6.
    """
    check(chunk >= 1, "chunk", chunk, "an integer of at least 1")
    compute = compute_dtype(x, delta, A, B, C, D, state)
    batch, num_steps, heads, width = x.shape
    if state is None:
        state = x.new_zeros((batch, heads, width, B.shape[2]), dtype=compute)
    if x.numel() == 0:
        return x, state.to(compute)
    u, step_sizes, b, c = (z.to(compute) for z in (x, delta, B, C))
    skip = u.new_zeros(heads) if D is None else D.to(compute)
    steps = step_sizes * A.to(compute)
    if reset is not None:
        steps = steps.masked_fill(reset.unsqueeze(-1), -torch.inf)
    inputs = (u, step_sizes, steps, b, c, skip, state.to(compute))
    if num_steps == 1:
        y, last = _step(*inputs, strict)
    else:
        y, last = beside_the_graph(_Chunked.call, *inputs, chunk, strict)
    return y.to(x.dtype), last
