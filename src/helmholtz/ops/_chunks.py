"""Decayed causal sums over a matrix-valued state: products inside chunks, a state between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._recompute import recomputed
from helmholtz.ops.scan import WIDE_CHUNK, from_zero

CHANNEL_CHUNK = 4
"""Chunks whose states are carried at once where each channel has decays of its own."""

# Shapes: n chunks of L steps, a power of two. `since_i` is what decays from a span's start
# up to i, `until_j` what decays after j up to its end. Log decays are only added and factors only multiplied: no
# exponent is above 0, none is a difference of sums, and a step's gradient sums the pairs it separates alone.


def chunked_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    *,
    chunk: int,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(out: B H T V, state after: B H K V)`` of ``linear_attention`` in the compute dtype, all chunks at once.

    Args:
        q, k, v: in the compute dtype, or bfloat16; heads of q and k broadcast.
        log_decay: ``B H T E`` with one decay per step (``E = 1``) or per key channel (``E = K``).
        strict: leave the pairs ``i = j`` out.
    """
    compute = compute_dtype(q, k, v, log_decay, state)
    by_channel = log_decay is not None and log_decay.shape[-1] > 1
    (batch, heads, steps, width), keys = v.shape, k.shape[3]
    if kernels.usable("linear_attention", q, k, v, log_decay, state) and not by_channel:
        q, k = (x.expand(-1, heads, -1, -1) for x in (q, k))
        decays = None if log_decay is None else log_decay.squeeze(-1).expand(v.shape[:3])
        start = v.new_zeros(batch, heads, keys, width, dtype=compute) if state is None else state
        return torch.ops.helmholtz.linear_attention(q, k, v, decays, start, strict, False)[:2]
    length = min(chunk, 1 << (steps - 1).bit_length())

    def chunks(x: Tensor) -> Tensor:  # of all heads and rows side by side
        x = x.to(compute)
        x = x if x.shape[1] == heads else x.expand(batch, heads, -1, -1)
        x = F.pad(x, (0, 0, 0, -steps % length)) if steps % length else x
        return x.reshape(-1, length, x.shape[3])

    q, k, v = chunks(q), chunks(k), chunks(v)
    with full_precision(v.device):
        reads, writes, total = q, k, None
        if log_decay is None:
            scores = torch.bmm(q, k.mT)
        else:
            decays = chunks(log_decay)
            of = _channel_scores if by_channel else _step_scores
            # kept, it would be two more squares of a chunk, or log2 L copies of q and k
            scores, since, until = recomputed(of, q, k, decays)
            reads, writes = q * since, k * until
            total = since[:, -1].view(batch, heads, -1, since.shape[2])
        added = torch.bmm(writes.mT, v).view(batch, heads, -1, keys, width)
        starts, last = carry(added, total, state)
        inside = torch.bmm(scores.tril(-1 if strict else 0), v)
        out = torch.baddbmm(inside, reads, starts.flatten(0, 2)).view(batch, heads, -1, width)
    return out[:, :, :steps] if steps % length else out, last


def _step_scores(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(q_i . k_j times the decays from j to i, since, until)`` of one decay per step; for ``i < j`` anything."""
    length = q.shape[1]
    between = log_decay.expand(-1, -1, length).tril(-1).cumsum(1).exp()  # over j < s <= i
    return torch.bmm(q, k.mT) * between, log_decay.cumsum(1).exp(), between[:, -1].unsqueeze(-1)


def _channel_scores(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one decay per key channel: halves of spans that double, from one step to the whole chunk.

    For i in the right and j in the left half the decays from j to i are ``since_i until_j``.
    """
    q, k, since = (x.unsqueeze(-2) for x in (q, k, log_decay.exp()))  # blocks of one step
    until, scores = torch.ones_like(since), (q * k).sum(-1, keepdim=True)
    scores = scores.expand(*since.shape[:-1], 1)
    while q.shape[-3] > 1:
        (_, q_right), (k_left, _) = _halves(q), _halves(k)
        (left_since, right_since), (left_until, right_until) = _halves(since), _halves(until)
        upper, lower = _halves(scores)
        cross = (q_right * right_since) @ (k_left * left_until).mT
        rows = [torch.cat([upper, torch.zeros_like(upper)], -1), torch.cat([cross, lower], -1)]
        scores = torch.cat(rows, -2)
        through_left, through_right = left_since[..., -1:, :], right_since[..., -1:, :]
        since = torch.cat([left_since, right_since * through_left], -2)
        until = torch.cat([left_until * through_right, right_until], -2)
        q, k = (x.unflatten(-3, (-1, 2)).flatten(-3, -2) for x in (q, k))
    return scores.squeeze(-3), since.squeeze(-3), until.squeeze(-3)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring blocks ``... b m E`` of an even number."""
    left, right = x.unflatten(-3, (-1, 2)).unbind(-3)
    return left, right


def carry(added: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """``state`` before each of the chunks, where each makes it ``decay state + added``, and after the last; decays are
    ``B H n E``."""
    if state is not None:
        first = state if decay is None else decay[:, :, 0].unsqueeze(-1) * state
        added = torch.cat([added[:, :, :1] + first.unsqueeze(2), added[:, :, 1:]], 2)
    if decay is None:
        ends = added.cumsum(2)
    elif decay.shape[3] == 1:  # of all of the state
        ends = from_zero(decay.squeeze(3), added.flatten(3), WIDE_CHUNK).view_as(added)
    else:
        ends = from_zero(decay.mT, added.transpose(2, 3), CHANNEL_CHUNK).transpose(2, 3)
    before = F.pad(ends[:, :, :-1], (0, 0, 0, 0, 1, 0))
    if state is not None:
        before = torch.cat([state.unsqueeze(2), ends[:, :, :-1]], 2)
    return before, ends[:, :, -1]
