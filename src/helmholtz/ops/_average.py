"""Softmax averages where no kernel of this library runs: by SDPA, or by products and a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._recompute import recomputed

LONGEST = 256
"""Queries whose weights the plain form holds at once; of more, they are computed again for the backward pass."""

WIDEST, WIDEST_OF_MORE = 256, 64
"""Rows that the GPU kernel has registers for, of bf16 and of more digits."""


def check_queries(q: Tensor, k: Tensor, causal: bool) -> None:
    """Raise ValueError unless heads divide and causal queries are places of the keys."""
    heads, groups = q.shape[1], k.shape[1]
    if heads % groups:
        raise ValueError(f"k: {groups} key/value heads do not divide {heads} query heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} causal queries cannot be the last positions of {k.shape[2]} keys")


def kernel_reads(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``helmholtz::softmax_read`` takes this call."""
    known = q.dtype in kernels.STORED and q.dtype == k.dtype == v.dtype
    widest = WIDEST if q.dtype == torch.bfloat16 else WIDEST_OF_MORE
    fits = q.is_cpu or (k.shape[3] <= widest and v.shape[3] <= widest)
    return known and fits and kernels.usable("softmax_read", q, k, v)


_TILES = bool(torch.cpu._is_amx_tile_supported())


def has_tiles() -> bool:
    """Whether the processor multiplies bf16 in tiles (AMX), as torch's own attention does and the kernel does not."""
    return _TILES  # asked for once: the compiler does not trace the question


def average(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax average under a mask that broadcasts to ``B H T S`` (bool: who is seen; float: added to the scores), or
    a causal one with ``T = S``: by SDPA, in the plain form by products and a softmax."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if kernels.wants_plain_forms():
        return _products(q, k, v, mask, causal, scale)
    width, out_width = max(k.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :out_width]


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    if q.shape[2] <= LONGEST:
        return _weighted(q, k, v, mask, causal, scale)
    parts = []
    for first in range(0, q.shape[2], LONGEST):
        last = min(first + LONGEST, q.shape[2])
        seen = last if causal else k.shape[2]
        part = None
        if mask is not None:
            part = mask[..., first:last, :seen] if mask.shape[-2] > 1 else mask[..., :seen]
        inputs = (q[:, :, first:last], k[:, :, :seen], v[:, :, :seen], part, causal, scale)
        parts.append(recomputed(_weighted, *inputs))
    return torch.cat(parts, dim=2)


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Causal queries are the last places of the keys. Heads of a group are rows of one product."""
    wide, (batch, heads, times, width), (groups, sources) = compute_dtype(q, k, v), q.shape, k.shape[1:3]
    share = heads // groups
    with full_precision(q.device):
        rows = q.to(wide).reshape(batch * groups, share * times, width)
        keys, values = (x.to(wide).flatten(0, 1) for x in (k, v))
        if causal:  # every row sees itself
            future = rows.new_full((times, sources), -torch.inf).triu(sources - times + 1)
            future = future if share == 1 else future.repeat(share, 1)
            weights = torch.baddbmm(future, rows, keys.mT, alpha=scale).softmax(-1)
        else:
            scores = torch.bmm(scale * rows, keys.mT)
            weights = _masked_softmax(scores.view(batch, heads, times, sources), mask).view_as(scores)
        read = torch.bmm(weights, values)
    return read.view(batch, heads, times, -1).to(v.dtype)


def _masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    hidden = ~mask if mask.dtype == torch.bool else mask.isneginf()
    scores = scores.masked_fill(hidden, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = hidden.all(-1, keepdim=True)  # these rows see nothing: 0, where a softmax would be NaN
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def visible(
    times: int,
    sources: int,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Bool mask that broadcasts to ``B 1 T S``, or None where everything is visible."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(times, device=device), cu_seqlens.to(device), right=True)
        same = sequence[:, None] == sequence
        return same.tril() if causal else same
    if not causal or times == 1:
        return mask
    lower = torch.ones(times, sources, dtype=torch.bool, device=device).tril(sources - times)
    return lower if mask is None else lower & mask
