"""Chunked linear attention with an analytic backward: matrix products inside chunks, a state between them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import full_precision

# Shapes: N = B H rows, L steps of a chunk (a power of two where there is a decay), E = 1 or K decays a step.
# `since_i` multiplies the decays from a span's start up to i, `until_j` those after j up to its end. Decays are
# only multiplied: for i right and j left of a midpoint e^{c_i - c_j} = since_i until_j, both at most 1, and
# halving again and again covers every pair i > j.


def _levels(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``(m, since of right halves, until of left halves)`` as ``N blocks m E`` for m = 1, 2, 4, ... below L.

    Both arguments are extended in place from spans of one step to the whole chunk.
    """
    half = 1
    while half < since.shape[1]:
        left, right = since.unflatten(1, (-1, 2, half)).unbind(2)
        before, after = until.unflatten(1, (-1, 2, half)).unbind(2)
        yield half, right, before
        before *= right[:, :, -1:]
        right *= left[:, :, -1:]
        half *= 2


def _blocks(x: Tensor, half: int) -> Tensor:
    """The blocks ``N blocks m m`` of ``x: N L L`` with queries in right and keys in left halves."""
    halves = x.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))
    return halves[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves ``N blocks m E`` of ``x: N L E``."""
    left, right = x.unflatten(1, (-1, 2, half)).unbind(2)
    return left, right


def _weights(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(e^{c_i - c_j} for i >= j else 0, since, until)`` of one decay per step."""
    since, until = decay.clone(), torch.ones_like(decay)
    weights = torch.eye(decay.shape[1], dtype=decay.dtype, device=decay.device).repeat(decay.shape[0], 1, 1)
    for half, right, left in _levels(since, until):
        torch.mul(right, left.mT, out=_blocks(weights, half))
    return weights, since, until


def _channel_scores(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(sum_k q_i e^{c_i - c_j} k_j for i >= j else 0, since, until)`` of one decay per key channel."""
    since, until = decay.clone(), torch.ones_like(decay)
    scores = torch.diag_embed((q * k).sum(-1))
    for half, right, left in _levels(since, until):
        queries, keys = _halves(q, half)[1] * right, _halves(k, half)[0] * left
        _blocks(scores, half).copy_(queries @ keys.mT)
    return scores, since, until


def _channel_backward(
    q: Tensor, k: Tensor, decay: Tensor, dscores: Tensor, dq: Tensor, dk: Tensor, dlog: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradients of ``_channel_scores`` to ``dq``, ``dk`` and ``dlog``; returns its results again."""
    since, until = decay.clone(), torch.ones_like(decay)
    scores = torch.diag_embed((q * k).sum(-1))
    diagonal = dscores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq.addcmul_(diagonal, k)
    dk.addcmul_(diagonal, q)
    upper = torch.ones_like(dscores[0]).triu_()
    for half, right, left in _levels(since, until):
        queries, keys = _halves(q, half)[1] * right, _halves(k, half)[0] * left
        _blocks(scores, half).copy_(queries @ keys.mT)
        dblock = _blocks(dscores, half).contiguous()
        dqueries, dkeys = dblock @ keys, dblock.mT @ queries
        _halves(dq, half)[1].addcmul_(dqueries, right)
        _halves(dk, half)[0].addcmul_(dkeys, left)
        tri = upper[:half, :half]
        _halves(dlog, half)[1].add_(tri @ (queries * dqueries))
        _halves(dlog, half)[0].add_((tri.mT - tri.diag().diag()) @ (keys * dkeys))
    return scores, since, until


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """``(out, state after)`` of one chunk."""
    since = until = None
    if decay is None:
        scores = (q @ k.mT).tril_()
    elif decay.shape[-1] == 1:
        scores, since, until = _weights(decay)
        scores.mul_(q @ k.mT)
    else:
        scores, since, until = _channel_scores(q, k, decay)
    out = torch.bmm(scores, v).baddbmm_(_scaled(q, since), state)
    start = state if since is None else state * since[:, -1].unsqueeze(-1)
    return out, torch.baddbmm(start, _scaled(k, until).mT, v)


def _chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of ``q, k, v``, of the log decay and of the state before one chunk."""
    dscores = dout @ v.mT
    dq, dk = dout @ state.mT, v @ dstate.mT
    if decay is None:
        dscores.tril_()
        scores = (q @ k.mT).tril_()
        dv = torch.bmm(scores.mT, dout).baddbmm_(k, dstate)
        return dq.baddbmm_(dscores, k), dk.baddbmm_(dscores.mT, q), dv, None, dstate.baddbmm(q.mT, dout)
    upper = torch.ones_like(dscores[0]).triu_()
    strictly_lower = upper.mT - torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    if decay.shape[-1] == 1:
        weights, since, until = _weights(decay)
        scores = (q @ k.mT).mul_(weights)
        crossing = (upper @ (dscores * scores)).mul_(strictly_lower)  # pairs i >= t > j, summed over i
        dlog = crossing.sum(-1, keepdim=True)
        dscores.mul_(weights)
        dq.mul_(since)
        dk.mul_(until)
        from_past, to_future = (q * dq).sum(-1, keepdim=True), (k * dk).sum(-1, keepdim=True)
        through = (state * dstate).sum((1, 2)).view(-1, 1, 1)
        dq.baddbmm_(dscores, k)
        dk.baddbmm_(dscores.mT, q)
    else:
        dlog = torch.zeros_like(decay)
        dq_inside, dk_inside = torch.zeros_like(q), torch.zeros_like(k)
        scores, since, until = _channel_backward(q, k, decay, dscores, dq_inside, dk_inside, dlog)
        dq.mul_(since)
        dk.mul_(until)
        from_past, to_future = q * dq, k * dk
        through = (state * dstate).sum(-1).unsqueeze(1)
        dq += dq_inside
        dk += dk_inside
    dlog += upper @ from_past + strictly_lower @ to_future + through * since[:, -1:]
    dv = torch.bmm(scores.mT, dout).baddbmm_(k * until, dstate)
    before = (dstate * since[:, -1].unsqueeze(-1)).baddbmm_((q * since).mT, dout)
    return dq, dk, dv, dlog, before


def _spans(num_steps: int, length: int) -> list[slice]:
    return [slice(i, min(i + length, num_steps)) for i in range(0, num_steps, length)]


class Chunked(DifferentiableOnce):
    """``(out, last state)`` of rows ``N T K``; keeps the state before each chunk, recomputes the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        keep: Tensor | None,
        state: Tensor,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        decay = _decays(log_decay, keep)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        starts = []
        with full_precision(q.device):
            for t in _spans(q.shape[1], length):
                starts.append(state)
                a = None if decay is None else decay[:, t]
                out[:, t], state = _chunk_forward(q[:, t], k[:, t], v[:, t], a, state)
        ctx.save_for_backward(q, k, v, log_decay, keep, *starts)
        ctx.length = length
        return out, state

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, keep, *starts = ctx.saved_tensors
        decay = _decays(log_decay, keep)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dlog = None if log_decay is None else torch.empty_like(log_decay)
        with full_precision(q.device):
            for t, start in zip(_spans(q.shape[1], ctx.length)[::-1], starts[::-1], strict=True):
                a = None if decay is None else decay[:, t]
                grads = _chunk_backward(q[:, t], k[:, t], v[:, t], a, start, dout[:, t], dstate)
                dq[:, t], dk[:, t], dv[:, t], da, dstate = grads
                if dlog is not None and da is not None:
                    dlog[:, t] = da
        return dq, dk, dv, dlog, None, dstate, None


def _decays(log_decay: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """Decays ``N T E`` as factors, 0 where a sequence starts; None where nothing decays."""
    if log_decay is None:
        return keep
    return log_decay.exp() if keep is None else log_decay.exp().mul_(keep)
