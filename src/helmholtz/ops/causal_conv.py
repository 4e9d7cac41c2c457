"""A short convolution over the past, one filter per channel."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import beside_the_graph, compute_dtype

_BLOCK = 2**16
"""Elements worked on at a time: the passes over a block's taps find it in a core's cache."""


def _blocks(batch: int, num_steps: int, channels: int) -> list[slice]:
    length = max(1, _BLOCK // max(1, batch * channels))
    return [slice(i, min(i + length, num_steps)) for i in range(0, num_steps, length)]


def _shifted(t: slice, tap: int) -> slice:
    return slice(t.start + tap, t.stop + tap)


class _Taps(DifferentiableOnce):
    """``y_t = bias + sum_w same_tw weight_w padded_{t + w}``, with ``weight: W C`` and ``same: B T W 1`` or None."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, same: Tensor | None) -> Tensor:
        batch, num_steps, channels = padded.shape
        y = padded.new_empty(batch, num_steps - len(weight) + 1, channels)
        for t in _blocks(*y.shape):
            out = y[:, t].copy_(bias)
            for w, row in enumerate(weight):
                seen = padded[:, _shifted(t, w)]
                out.addcmul_(seen if same is None else seen * same[:, t, w], row)
        ctx.save_for_backward(padded, weight, same)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, same = ctx.saved_tensors
        dpadded, dweight = torch.zeros_like(padded), torch.zeros_like(weight)
        for t in _blocks(*dy.shape):
            for w, row in enumerate(weight):
                d, seen = dy[:, t], _shifted(t, w)
                d = d if same is None else d * same[:, t, w]
                dpadded[:, seen].addcmul_(d, row)
                dweight[w] += (d * padded[:, seen]).sum((0, 1))
        return dpadded, dweight, dy.sum((0, 1)), None


def _pick(x: Float[Tensor, "B T C"], rows: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segment: Tensor | None, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(y, state)`` of tokens without pads between them, of which each row has ``count`` (None: all).

    ``segment: B T`` numbers the sequences of a row from 0 on, the one of ``state``.
    """
    past = weight.shape[1] - 1
    padded = torch.cat([state, x], dim=1)
    same = None
    if segment is not None:
        segment = F.pad(segment, (past, 0))
        windows = segment.unfold(1, past + 1, 1) == segment[:, past:, None]
        same = windows.unsqueeze(-1).to(x.dtype)
    if x.shape[1] == 1:  # a step of a stream
        seen = padded if same is None else padded * same[:, 0]
        y = (seen * weight.T).sum(1, keepdim=True) + bias
    else:
        y = beside_the_graph(_Taps.call, padded, weight.T.contiguous(), bias, same)
    if count is None:
        return y, padded[:, x.shape[1] :]
    return y, _pick(padded, count.unsqueeze(-1) + torch.arange(past, device=x.device))


def causal_conv(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, "C"] | None = None,
    *,
    state: Float[Tensor, "B W1 C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W1 C"]]:
    r"""Filter every channel over its last W real tokens.

    .. math:: y_t = b + \sum_{w < W} k_w \, x_{t - (W - 1) + w}

    Before its first token a sequence was 0.

    Args:
        weight: the filters, the weight of the current token last.
        state: the W - 1 real tokens before these, the latest last; zeros by default.
        mask: True where a token is real. Others are skipped, as if they were not there; there ``y`` is 0.
        reset: where True, a sequence starts and all before counts as 0.

    Returns:
        ``(y, last)``; ``last`` is the state after these tokens in the compute dtype.

    Accuracy: computed in at least float32.
    Cost: time ``O(B T C W)``, memory ``O(B T C)``; a mask adds two reorderings of ``x``.
    """
    compute = compute_dtype(x, weight, bias, state)
    batch, num_steps, channels = x.shape
    past = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros((batch, past, channels), dtype=compute)
    state = state.to(compute)
    if num_steps == 0:
        return x, state
    rows = x.to(compute)
    taps, shift = weight.to(compute), rows.new_zeros(channels) if bias is None else bias.to(compute)
    segment = None if reset is None else reset.cumsum(1)
    if mask is None:
        y, last = _convolve(rows, taps, shift, state, segment, None)
    else:
        pads = ~mask.unsqueeze(-1)
        real_first = (~mask).byte().argsort(dim=1, stable=True)
        ordered = None if segment is None else segment.gather(1, real_first)
        rows = _pick(rows.masked_fill(pads, 0), real_first)
        y, last = _convolve(rows, taps, shift, state, ordered, mask.sum(1))
        y = _pick(y, (mask.cumsum(1) - 1).clamp(min=0)).masked_fill(pads, 0)
    if segment is not None:
        last = _forget(last, segment, mask)
    return y.to(x.dtype), last


def _forget(
    last: Float[Tensor, "B W1 C"], segment: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B W1 C"]:
    """``last`` without what lies before the sequence that is open at the end."""
    current = segment == segment[:, -1:]
    count = (current if mask is None else current & mask).sum(1, keepdim=True)
    age = torch.arange(last.shape[1], 0, -1, device=last.device)
    return last.masked_fill(((age > count) & (segment[:, -1:] > 0)).unsqueeze(-1), 0)
