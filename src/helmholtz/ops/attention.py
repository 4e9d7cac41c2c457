"""Softmax average of any values: masks, packing, grouped heads and unequal widths handled once, for every caller."""

import importlib.util

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check
from helmholtz._once import mark_as_once
from helmholtz.ops._average import average, check_queries, has_tiles, kernel_reads, visible
from helmholtz.ops._dispatch import Backend, choose
from helmholtz.ops.rope import rotate_split


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

    Cost: O(T S (K + V)) time. Memory O(T + S) from the kernel; without it also where nothing is masked or packed, else
        plus one bool ``B T S``. There the narrower of keys and values is padded with zeros, as unequal widths would
        fall to a path that builds the scores.
    Raises: ValueError if heads do not divide, if causal queries outnumber the keys, or from the named backend.
    """
    check_queries(q, k, causal)
    run = choose(_BACKENDS, backend, q, k, v, key_mask, cu_seqlens).run
    return run(q, k, v, causal, key_mask, cu_seqlens)


def attention_step(
    joint: Float[Tensor, "B T NK"],
    cos: Float[Tensor, "*BT K"],
    sin: Float[Tensor, "*BT K"],
    keys: Float[Tensor, "B G C K"],
    values: Float[Tensor, "B G C K"],
    *,
    before: int,
    heads: int,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B T HK"]:
    """Causal attention of the next T tokens of a stream, whose keys and values are written into the memory of a cache.

    Args:
        joint: queries, keys and values of ``H + 2 G`` heads side by side, not rotated.
        cos: and ``sin``, the ``rope_table`` of these tokens.
        keys: memory of C tokens that holds ``before`` rotated ones. Those of the next T are written behind them, as
            are their ``values``.
        key_mask: True where a key may be seen, of the first ``S = before + T`` keys.

    Cost: O(T S K) time; the kernel is one call where the plain form makes a dozen. No gradients, as memory is changed.
    Raises: ValueError if heads do not add up or the memory is too short.
    """
    assert not torch.is_grad_enabled()
    of_one_dtype = joint.dtype == keys.dtype == values.dtype
    if (
        of_one_dtype
        and joint.dtype in kernels.STORED
        and kernels.usable("attention_step", joint, keys)
        and not _in_tiles(joint)
    ):
        read: Tensor = torch.ops.helmholtz.attention_step(
            joint, cos, sin, keys, values, key_mask, before, heads
        )
        return read
    groups, time = keys.shape[1], joint.shape[1]
    q, k, v = rotate_split(joint.unflatten(-1, (-1, keys.shape[-1])), cos, sin, heads, groups)
    check(before + time <= keys.shape[2], "keys", tuple(keys.shape), f"memory for {before} + {time} tokens")
    for memory, new in ((keys, k), (values, v)):
        memory.narrow(2, before, time).copy_(new)
    keys, values = (memory.narrow(2, 0, before + time) for memory in (keys, values))
    return softmax_attention(q, keys, values, key_mask=key_mask).transpose(1, 2).flatten(2)


def _in_tiles(x: Tensor) -> bool:
    """Whether torch's own attention is the faster one for this dtype."""
    return x.dtype == torch.bfloat16 and has_tiles()


def _torch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    masked = key_mask is not None or cu_seqlens is not None  # for which torch wants queries by keys in memory
    pays = not _in_tiles(q) if q.is_cpu else masked
    if pays and kernel_reads(q, k, v):
        read, _ = torch.ops.helmholtz.softmax_read(q, k, v, None, key_mask, cu_seqlens, causal, 0.0)
        return read.squeeze(3).to(q.dtype)
    times, sources = q.shape[2], k.shape[2]
    if causal and times == sources and key_mask is None and cu_seqlens is None:
        return average(q, k, v, causal=True)
    return average(q, k, v, mask=visible(times, sources, causal, key_mask, cu_seqlens, q.device))


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
    Backend("torch", _torch, lambda *_: None),
)
