"""Softmax average of any values: masks, packing, grouped heads and unequal widths handled once, for every caller."""

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._once import mark_as_once
from helmholtz.ops._dispatch import Backend, choose


def softmax_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool = True,
    key_mask: Bool[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, "n1"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H T V"]:
    r"""Average of the values under ``p_t(i) = softmax_i(q_t . k_i / sqrt(K))``.

    A causal query ``t`` is the ``(S - T + t)``-th position of the keys: with ``T < S`` the queries are the last ``T``
    (a stream). A query that sees no key returns 0 with gradient 0.

    Args:
        key_mask: True where a key may be seen.
        cu_seqlens: bounds of sequences that lie end to end in one row (``B = 1``, ``T = S``) and do not see each other.
        backend: "auto", "torch" or "flash_attn"; a named backend runs or raises with its reason.

    Cost: O(T S (K + V)) time; memory O(T + S) without masks, plus one bool ``B T S`` with them. The narrower of keys
        and values is padded with zeros: unequal widths would fall to a path that builds the scores.
    Raises: ValueError if heads do not divide, if causal queries outnumber the keys, or from the named backend.
    """
    heads, groups = q.shape[1], k.shape[1]
    if heads % groups:
        raise ValueError(f"k: {groups} key/value heads do not divide {heads} query heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} causal queries cannot be the last positions of {k.shape[2]} keys")
    run = choose(_BACKENDS, backend, q, k, v, key_mask, cu_seqlens).run
    return run(q, k, v, causal, key_mask, cu_seqlens)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([_sdpa(a, b, c, causal, None, None) for a, b, c in parts], dim=2)
    width, out_width, scale = max(k.shape[-1], v.shape[-1]), v.shape[-1], k.shape[-1] ** -0.5
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    times, sources = q.shape[2], k.shape[2]
    full_triangle = causal and times == sources and key_mask is None
    visible = None if full_triangle else _visible(times, sources, causal, key_mask, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=full_triangle, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :out_width]


def _visible(
    times: int, sources: int, causal: bool, key_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Bool mask that broadcasts to ``B 1 T S``, or None where everything is visible."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if not causal or times == 1:
        return mask
    lower = torch.ones(times, sources, dtype=torch.bool, device=device).tril(sources - times)
    return lower if mask is None else lower & mask


def _flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    import flash_attn

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cu_seqlens is None:
        out = flash_attn.flash_attn_func(q, k, v, causal=causal)
    else:
        bounds, longest = cu_seqlens.int(), int(cu_seqlens.diff().max())
        rows = (x[0] for x in (q, k, v))
        out = flash_attn.flash_attn_varlen_func(*rows, bounds, bounds, longest, longest, causal=causal)
        out = out.unsqueeze(0)
    mark_as_once("flash_attn", out)
    return out.transpose(1, 2)


def _flash_refuses(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    if not q.is_cuda:
        return f"it needs CUDA tensors, these are on {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        return f"it takes float16 or bfloat16, these are {got} (a free-energy read needs float32)"
    if k.shape[-1] != v.shape[-1]:
        return f"it needs equal key and value widths, these are {k.shape[-1]} and {v.shape[-1]}"
    if k.shape[-1] > 256:
        return f"it takes head widths up to 256, this is {k.shape[-1]}"
    if key_mask is not None:
        return "it takes no padding mask: pack the sequences (cu_seqlens)"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return None


_BACKENDS = (
    Backend("flash_attn", _flash, _flash_refuses),
    Backend("torch", _sdpa, lambda *_: None),
)
