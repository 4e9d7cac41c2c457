"""A short convolution over the past, one filter per channel."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import as_dtype, compute_dtype
from helmholtz.ops._recompute import recomputed


def causal_conv(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, "C"] | None = None,
    *,
    state: Float[Tensor, "B W1 C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W1 C"]]:
    r"""Filter every channel over its last W real tokens.

    .. math:: y_t = f\Big(b + \sum_{w < W} k_w \, x_{t - (W - 1) + w}\Big)

    Before its first token a sequence was 0.

    Args:
        weight: the filters, the weight of the current token last.
        state: the W - 1 real tokens before these, the latest last; zeros by default.
        mask: True where a token is real. Others are skipped, as if they were not there; there ``y`` is 0.
        reset: where True, a sequence starts and all before counts as 0.
        activation: :math:`f`, the identity by default.

    Returns:
        ``(y, last)``; ``last`` is the state after these tokens in the compute dtype.

    Accuracy: computed in at least float32, one rounding to the dtype of ``x``.
    Cost: time ``O(B T C W)``, memory ``O(B T C)``. The kernel reads bf16 directly and makes one pass forward and one
        backward; in the plain form a mask adds two reorderings of ``x``.
    """
    compute = compute_dtype(x, weight, bias, state)
    if state is None:
        state = x.new_zeros((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=compute)
    if x.shape[1] == 0:
        return x, state.to(compute)
    shift = weight.new_zeros(len(weight)) if bias is None else bias
    taps, shift, state = as_dtype(weight, compute), as_dtype(shift, compute), as_dtype(state, compute)
    if kernels.usable("causal_conv", x, taps, shift, state, mask, reset):
        rows = x if x.dtype == torch.bfloat16 and compute == torch.float32 else as_dtype(x, compute)
        y, last = torch.ops.helmholtz.causal_conv(rows, taps, shift, state, mask, reset, activation == "silu")
    else:
        y, last = _plain(x.to(compute), taps, shift, state, mask, reset)
        y = F.silu(y) if activation == "silu" else y
    return as_dtype(y, x.dtype), last


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    segment = None if reset is None else reset.cumsum(1)
    if mask is None:
        y, last = _convolve(x, weight, bias, state, segment, None)
    else:
        pads = ~mask.unsqueeze(-1)
        real_first = (~mask).byte().argsort(dim=1, stable=True)
        ordered = None if segment is None else segment.gather(1, real_first)
        rows = _pick(x.masked_fill(pads, 0), real_first)
        y, last = _convolve(rows, weight, bias, state, ordered, mask.sum(1))
        y = _pick(y, (mask.cumsum(1) - 1).clamp(min=0)).masked_fill(pads, 0)
    return y, last if segment is None else _forget(last, segment, mask)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segment: Tensor | None, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(y, state)`` of tokens without pads between them, of which each row has ``count`` (None: all).

    ``segment: B T`` numbers the sequences of a row from 0 on, the one of ``state``.
    """
    past = weight.shape[1] - 1
    padded = torch.cat([state, x], dim=1)
    if segment is None:
        y = _filtered(padded, weight, bias, None)
    else:
        segment = F.pad(segment, (past, 0))
        same = segment.unfold(1, past + 1, 1) == segment[:, past:, None]
        y = recomputed(_filtered, padded, weight, bias, same)  # it would keep each tap's masked copy of x
    if count is None:
        return y, padded[:, x.shape[1] :]
    return y, _pick(padded, count.unsqueeze(-1) + torch.arange(past, device=x.device))


def _filtered(padded: Tensor, weight: Tensor, bias: Tensor, same: Tensor | None) -> Tensor:
    """``y_t = bias + sum_w same_tw weight_w padded_{t + w}``, with ``same: B T W``."""
    num_steps = padded.shape[1] - weight.shape[1] + 1
    y = bias
    for w, row in enumerate(weight.unbind(1)):
        seen = padded[:, w : w + num_steps]
        y = torch.addcmul(y, seen if same is None else seen * same[:, :, w, None], row)
    return y


def _pick(x: Float[Tensor, "B T C"], rows: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _forget(
    last: Float[Tensor, "B W1 C"], segment: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B W1 C"]:
    """``last`` without what lies before the sequence that is open at the end."""
    current = segment == segment[:, -1:]
    count = (current if mask is None else current & mask).sum(1, keepdim=True)
    age = torch.arange(last.shape[1], 0, -1, device=last.device)
    return last.masked_fill(((age > count) & (segment[:, -1:] > 0)).unsqueeze(-1), 0)
