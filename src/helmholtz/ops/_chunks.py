"""Decayed causal sums over a matrix-valued state: products inside chunks, a state between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import full_precision
from helmholtz.ops._recompute import recomputed
from helmholtz.ops.scan import states

CHANNEL_CHUNK = 8
"""Chunks whose states are carried at once where each channel has decays of its own."""

# Shapes: n chunks of L steps, a power of two; heads of q and k broadcast. `since_i` is what decays from a span's start
# up to i, `until_j` what decays after j up to its end. Log decays are only added and factors only multiplied: no
# exponent is above 0, none is a difference of sums, and a step's gradient sums the pairs it separates alone.


def chunked_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    chunk: int,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(out: B H T V, state after: B H K V)`` of ``linear_attention`` in the dtype of ``state``, all chunks at once.

    Args:
        q, k, v: as ``state``, or bfloat16.
        log_decay: ``B H T E`` with one decay per step (``E = 1``) or per key channel (``E = K``).
        strict: leave the pairs ``i = j`` out.
    """
    by_channel = log_decay is not None and log_decay.shape[-1] > 1
    if kernels.usable(q, k, v, log_decay, state) and not by_channel:
        q, k = (x.expand(-1, v.shape[1], -1, -1) for x in (q, k))
        decays = None if log_decay is None else log_decay.squeeze(-1).expand(v.shape[:3])
        return torch.ops.helmholtz.linear_attention(q, k, v, decays, state, strict, False)[:2]
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    num_steps = v.shape[2]
    length = min(chunk, 1 << (num_steps - 1).bit_length())
    pad = -num_steps % length
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, length)) for x in (q, k, v))
    with full_precision(v.device):
        if log_decay is None:
            scores, total = (q @ k.mT).tril(-strict), None
            reads, writes = q, k
        else:
            log_decay = F.pad(log_decay, (0, 0, 0, pad)).unflatten(2, (-1, length))
            of = _channel_scores if by_channel else _step_scores
            # kept, it would be four squares of a chunk, or log2 L copies of q and k
            scores, since, until = recomputed(of, q, k, log_decay, strict)
            reads, writes, total = q * since, k * until, since[..., -1, :].unsqueeze(-1)
        starts, last = _carry(writes.mT @ v, total, state)
        out = scores @ v + reads @ starts
    return out.flatten(2, 3)[:, :, :num_steps], last


def _step_scores(q: Tensor, k: Tensor, log_decay: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(q_i . k_j times the decays from j to i, since, until)`` of one decay per step."""
    weights = decays_between(log_decay.squeeze(-1))
    scores = (q @ k.mT) * weights
    since, until = log_decay.cumsum(-2).exp(), weights[..., -1, :].unsqueeze(-1)
    return scores.tril(-1) if strict else scores, since, until


def decays_between(log_decay: Tensor) -> Tensor:
    """What decays from step j to step i, ``... i j``; 0 for ``i < j``."""
    length = log_decay.shape[-1]
    sums = log_decay.unsqueeze(-1).expand(*log_decay.shape, length).tril(-1).cumsum(-2)  # over j < s <= i
    return sums.exp().tril()


def _channel_scores(q: Tensor, k: Tensor, log_decay: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one decay per key channel: halves of spans that double, from one step to the whole chunk.

    For i in the right and j in the left half the decays from j to i are ``since_i until_j``.
    """
    q, k, since = (x.unsqueeze(-2) for x in (q, k, log_decay.exp()))  # blocks of one step
    until, scores = torch.ones_like(since), (q * k).sum(-1, keepdim=True) * (not strict)
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


def _carry(added: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """``state`` before each of the chunks, where each makes it ``decay state + added``, and after the last."""
    if decay is None:
        ends = added.cumsum(2) + state.unsqueeze(2)
        return torch.cat([state.unsqueeze(2), ends[:, :, :-1]], 2), ends[:, :, -1]
    if decay.shape[3] == 1:  # of all of the state
        ends = states(decay.flatten(2), added.flatten(3), state.flatten(2)).unflatten(3, state.shape[2:])
    else:
        ends = states(decay.squeeze(4).mT, added.transpose(2, 3), state, CHANNEL_CHUNK).transpose(2, 3)
    return ends[:, :, :-1], ends[:, :, -1]
