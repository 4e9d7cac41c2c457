"""Averages of values, or of values and exponentials of them, under a softmax over keys: blocks of queries against
blocks of keys, scores never whole (Dao et al., "FlashAttention", 2022). Floor, in products of 2 T S 64 operations per
head of width 64 (half of them where causal): forward 3, backward 4 for the queries' gradients and 6 for the keys', two
kernels that each make the weights again; bf16 one more in each of the three.

    s = q k / sqrt(K);   p = exp(s - lse);   mean = sum p v;   Z = sum p e,   e = exp(clip(beta v))
    dp = dmean v + dZ e;   ds = p (dp - delta),   delta = dmean mean + dZ Z
    dv = sum p dmean + [not clipped] beta e sum p dZ;   dbeta = sum [not clipped] v e sum p dZ

bf16: weights are rounded for the products, and so is their sum, which makes them an average to the last bit: without
that F is off by .4 at beta = .002. The exponential is a sum of two bf16 numbers. float32 is multiplied to its own
accuracy (three products in TF32 on NVIDIA, six in bf16 on AMD). float16 is widened and multiplied in TF32, which
holds its digits and float32's range; products with the exponential are those of float32. All outside of products is
float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import clipped, launch, power_of_2, target, with_whole_rows

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(X, start, stride, limit, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``start ...`` of a head, 0 beyond ``limit`` and beyond their width."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at = X + tl.cast(start, tl.int64) * stride + i * stride + j
    inside = (start + i < limit) & (j < WIDTH)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _put_rows(X, start, stride, limit, x, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at = X + tl.cast(start, tl.int64) * stride + i * stride + j
    tl.store(at, x, mask=(start + i < limit) & (j < WIDTH))


@triton.jit
def _rates(Beta, group, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    return tl.load(Beta + group * WIDTH + j, mask=j < WIDTH, other=0.0)[None, :]


@triton.jit
def _exponential(v, beta, cap):
    return tl.exp2(clipped(v.to(tl.float32) * beta, cap) * LOG2E)


@triton.jit
def _with_exponential(a, e, sums, FINE: tl.constexpr):
    """``sums + a e``, e in float32: of two parts where ``a`` is bf16."""
    if a.dtype == tl.bfloat16:
        high = e.to(tl.bfloat16)
        sums = tl.dot(a, high, sums)
        return tl.dot(a, (e - high.to(tl.float32)).to(tl.bfloat16), sums)
    else:
        return tl.dot(a, e, sums, input_precision=FINE)


@triton.jit
def _as_product(x, NARROW: tl.constexpr):
    """As the products take it: bf16, or float32."""
    return x.to(tl.bfloat16) if NARROW else x.to(tl.float32)


@triton.jit
def _scores(q, k, COARSE: tl.constexpr):
    """Queries by keys; half precision is multiplied as it is."""
    if q.dtype == tl.float32:
        return tl.dot(q, tl.trans(k), input_precision=COARSE)
    else:
        return tl.dot(q, tl.trans(k))


@triton.jit
def _seen(rows, columns, KeyMask, First, Last, times, sources, CAUSAL: tl.constexpr):
    """Which keys (columns) which queries (rows) see; one of the two lies along each dimension."""
    seen = (columns < sources) & (rows < times)
    if CAUSAL:
        seen &= columns <= rows + (sources - times)
    if KeyMask is not None:
        seen &= tl.load(KeyMask + columns, mask=columns < sources, other=0) != 0
    if First is not None:
        first = tl.load(First + rows, mask=rows < times, other=0)
        last = tl.load(Last + rows, mask=rows < times, other=0)
        seen &= (columns >= first) & (columns < last)
    return seen


@triton.jit
def _weighed(
    q, top, mass, mean, tilt, K, V, beta, KeyMask, First, Last, start, rows, k_s, v_s, scale, cap, times, sources,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, NARROW: tl.constexpr,
    COARSE: tl.constexpr, FINE: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block of keys: weights are relative to the largest score so far, and the sums fade where that grows."""
    score = _scores(q, _rows(K, start, k_s, sources, WIDTH, N, BK), COARSE) * scale
    if MASKED:
        columns = (start + tl.arange(0, N))[None, :]
        seen = _seen(rows[:, None], columns, KeyMask, First, Last, times, sources, CAUSAL)
        score = tl.where(seen, score, -float("inf"))
    most = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(most == -float("inf"), 0.0, most)
    weight = _as_product(tl.exp2(score - base[:, None]), NARROW)
    fade = tl.exp2(top - base)
    mass = mass * fade + tl.sum(weight.to(tl.float32), axis=1)
    v = _rows(V, start, v_s, sources, VALUES, N, BV)
    mean = tl.dot(weight, _as_product(v, NARROW), mean * fade[:, None], input_precision=COARSE)
    if beta is not None:
        tilt = _with_exponential(weight, _exponential(v, beta, cap), tilt * fade[:, None], FINE)
    return most, mass, mean, tilt


@triton.jit
def _softmax_read(
    Mixed, Lse, Q, K, V, Beta, KeyMask, First, Last, scale, cap, heads, share, times, sources,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mixed_b, mixed_h, mixed_t, mixed_n,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, NARROW: tl.constexpr, COARSE: tl.constexpr,
    FINE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # those that see most come first
    g, rows, end = h // share, row + tl.arange(0, M), tl.minimum(row + M, times)
    q = _rows(Q + b * q_b + h * q_h, row, q_t, times, WIDTH, M, BK)
    K, V = K + b * k_b + g * k_g, V + b * v_b + g * v_g
    beta = None
    if Beta is not None:
        beta = _rates(Beta, g, VALUES, BV)
    if KeyMask is not None:
        KeyMask += b * mask_b
    low, high, whole = 0, sources, sources // N * N
    if CAUSAL:
        high = sources - times + end
        whole = (sources - times + row + 1) // N * N
    if First is not None:
        low = tl.load(First + row) // N * N
        high = tl.minimum(high, tl.load(Last + end - 1))
    if (KeyMask is not None) or (First is not None):
        whole = low
    top, mass = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    mean, tilt = tl.zeros([M, BV], tl.float32), tl.zeros([M, BV], tl.float32)
    scaled = scale * LOG2E
    for start in range(low, whole, N):
        top, mass, mean, tilt = _weighed(
            q, top, mass, mean, tilt, K, V, beta, KeyMask, First, Last, start, rows, k_s, v_s, scaled, cap, times,
            sources, False, CAUSAL, WIDTH, VALUES, NARROW, COARSE, FINE, N, BK, BV,
        )  # fmt: skip
    for start in range(whole, high, N):
        top, mass, mean, tilt = _weighed(
            q, top, mass, mean, tilt, K, V, beta, KeyMask, First, Last, start, rows, k_s, v_s, scaled, cap, times,
            sources, True, CAUSAL, WIDTH, VALUES, NARROW, COARSE, FINE, N, BK, BV,
        )  # fmt: skip
    blind = mass == 0.0
    inverse = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, mass))[:, None]
    Mixed += b * mixed_b + h * mixed_h
    _put_rows(Mixed, row, mixed_t, times, mean * inverse, VALUES, M, BV)
    if Beta is not None:
        _put_rows(Mixed + mixed_n, row, mixed_t, times, tilt * inverse, VALUES, M, BV)
    # a query that saw nothing: its weights, exp(score - lse), are to be 0
    lse = tl.where(blind, float("inf"), (top + tl.log2(tl.where(blind, 1.0, mass))) * LN2)
    tl.store(Lse + (b * heads + h) * times + rows, lse, mask=rows < times)


@triton.jit
def _query_gradients(
    Dq, Delta, Dmixed, Mixed, Lse, Q, K, V, Beta, KeyMask, First, Last, scale, cap, heads, share, times, sources,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mixed_b, mixed_h, mixed_t, mixed_n,
    dmixed_b, dmixed_h, dmixed_t, dmixed_n, dq_b, dq_h, dq_t,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, NARROW: tl.constexpr, COARSE: tl.constexpr,
    FINE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    g, rows, end = h // share, row + tl.arange(0, M), tl.minimum(row + M, times)
    K, V = K + b * k_b + g * k_g, V + b * v_b + g * v_g
    Mixed, Dmixed = Mixed + b * mixed_b + h * mixed_h, Dmixed + b * dmixed_b + h * dmixed_h
    q = _rows(Q + b * q_b + h * q_h, row, q_t, times, WIDTH, M, BK)
    # what the normalisation takes off is made of the gradients as the products round them
    dmean = _as_product(_rows(Dmixed, row, dmixed_t, times, VALUES, M, BV), NARROW)
    delta = tl.sum(dmean.to(tl.float32) * _rows(Mixed, row, mixed_t, times, VALUES, M, BV), axis=1)
    beta, dtilt = None, dmean
    if Beta is not None:
        beta = _rates(Beta, g, VALUES, BV)
        dtilt = _as_product(_rows(Dmixed + dmixed_n, row, dmixed_t, times, VALUES, M, BV), NARROW)
        delta += tl.sum(
            dtilt.to(tl.float32) * _rows(Mixed + mixed_n, row, mixed_t, times, VALUES, M, BV), axis=1
        )
    if KeyMask is not None:
        KeyMask += b * mask_b
    of_rows = (b * heads + h) * times + rows
    lse = tl.load(Lse + of_rows, mask=rows < times, other=float("inf")) * LOG2E
    tl.store(Delta + of_rows, delta, mask=rows < times)
    low, high = 0, sources
    if CAUSAL:
        high = sources - times + end
    if First is not None:
        low = tl.load(First + row) // N * N
        high = tl.minimum(high, tl.load(Last + end - 1))
    dq = tl.zeros([M, BK], tl.float32)
    for start in tl.range(low, high, N, disable_licm=True):
        k, v = _rows(K, start, k_s, sources, WIDTH, N, BK), _rows(V, start, v_s, sources, VALUES, N, BV)
        columns = (start + tl.arange(0, N))[None, :]
        seen = _seen(rows[:, None], columns, KeyMask, First, Last, times, sources, CAUSAL)
        score = _scores(q, k, COARSE) * (scale * LOG2E) - lse[:, None]
        p = tl.exp2(tl.where(seen, score, -float("inf")))
        dp = tl.dot(dmean, tl.trans(_as_product(v, NARROW)), input_precision=COARSE)
        if Beta is not None:
            dp = _with_exponential(dtilt, tl.trans(_exponential(v, beta, cap)), dp, FINE)
        ds = p * (dp - delta[:, None]) * scale
        dq = tl.dot(_as_product(ds, NARROW), _as_product(k, NARROW), dq, input_precision=COARSE)
    _put_rows(Dq + b * dq_b + h * dq_h, row, dq_t, times, dq, WIDTH, M, BK)


@triton.jit
def _key_gradients(
    Dk, Dv, Dbeta, Delta, Dmixed, Lse, Q, K, V, Beta, KeyMask, First, Last, scale, cap, groups, share, times, sources,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, dmixed_b, dmixed_h, dmixed_t, dmixed_n,
    dk_b, dk_g, dk_s, dv_b, dv_g, dv_s,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, NARROW: tl.constexpr, COARSE: tl.constexpr,
    FINE: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    column = tl.program_id(1) * N  # of a causal read the first keys are seen by most
    columns = column + tl.arange(0, N)
    k = _rows(K + b * k_b + g * k_g, column, k_s, sources, WIDTH, N, BK)
    v = _rows(V + b * v_b + g * v_g, column, v_s, sources, VALUES, N, BV)
    value = _as_product(v, NARROW)
    if Beta is not None:
        beta = _rates(Beta, g, VALUES, BV)
        e = _exponential(v, beta, cap)
        high = _as_product(e, NARROW)
        low = _as_product(e - high.to(tl.float32), NARROW)
    if KeyMask is not None:
        KeyMask += b * mask_b
    start, end = 0, times
    if CAUSAL:
        start = tl.maximum(column - (sources - times), 0) // M * M
    if First is not None:  # as many queries as keys, a sequence's queries are its keys
        start = tl.maximum(start, tl.load(First + column) // M * M)
        end = tl.load(Last + tl.minimum(column + N, sources) - 1)
    dk = tl.zeros([N, BK], tl.float32)
    dvalue, dtilted = tl.zeros([N, BV], tl.float32), tl.zeros([N, BV], tl.float32)
    for i in range(0, share):
        h = g * share + i
        for row in tl.range(start, end, M, disable_licm=True):
            rows = row + tl.arange(0, M)
            of_rows = (b * groups * share + h) * times + rows
            lse = tl.load(Lse + of_rows, mask=rows < times, other=float("inf")) * LOG2E
            delta = tl.load(Delta + of_rows, mask=rows < times, other=0.0)
            q = _rows(Q + b * q_b + h * q_h, row, q_t, times, WIDTH, M, BK)
            grads = Dmixed + b * dmixed_b + h * dmixed_h
            dmean = _as_product(_rows(grads, row, dmixed_t, times, VALUES, M, BV), NARROW)
            dtilt = dmean
            if Beta is not None:
                dtilt = _as_product(_rows(grads + dmixed_n, row, dmixed_t, times, VALUES, M, BV), NARROW)
            # keys by queries: what stays is the products' first operand, which no two groups of threads share
            seen = _seen(rows[None, :], columns[:, None], KeyMask, First, Last, times, sources, CAUSAL)
            score = _scores(k, q, COARSE) * (scale * LOG2E) - lse[None, :]
            p = tl.exp2(tl.where(seen, score, -float("inf")))
            if OF_KEYS:
                dp = tl.dot(value, tl.trans(dmean), input_precision=COARSE)
                if Beta is not None:
                    dp = tl.dot(high, tl.trans(dtilt), dp, input_precision=FINE)
                    if NARROW:
                        dp = tl.dot(low, tl.trans(dtilt), dp)
                ds = _as_product(p * (dp - delta[None, :]) * scale, NARROW)
                dk = tl.dot(ds, _as_product(q, NARROW), dk, input_precision=COARSE)
            if OF_VALUES:
                weight = _as_product(p, NARROW)
                dvalue = tl.dot(weight, dmean, dvalue, input_precision=COARSE)
                if Beta is not None:
                    dtilted = tl.dot(weight, dtilt, dtilted, input_precision=COARSE)
    if OF_KEYS:
        _put_rows(Dk + b * dk_b + g * dk_g, column, dk_s, sources, dk, WIDTH, N, BK)
    if OF_VALUES:
        if Beta is not None:
            x = v.to(tl.float32)
            dexponent = tl.where(tl.abs(x * beta) < cap, dtilted * e, 0.0)
            dvalue += beta * dexponent
            j = tl.arange(0, BV)
            part = ((b * tl.num_programs(1) + tl.program_id(1)) * groups + g) * VALUES + j
            tl.store(Dbeta + part, tl.sum(x * dexponent, axis=0), mask=j < VALUES)
        _put_rows(Dv + b * dv_b + g * dv_g, column, dv_s, sources, dvalue, VALUES, N, BV)


Blocks = dict[str, int]
"""Queries M and keys N of a block, groups of 32 (AMD: 64) threads, and blocks that are read ahead."""


def _blocks(rows: int, keys: int, warps: int, stages: int) -> Blocks:
    return {"M": rows, "N": keys, "num_warps": warps, "num_stages": stages}


Choice = dict[tuple[int, bool], tuple[tuple[int, int, int, int], ...]]
# For A100, H100 and MI300, by the widest row, bf16 and then the rest: the largest blocks found that spill no register.
READ: Choice = {
    (64, True): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2)),
    (128, True): ((64, 64, 8, 2), (128, 32, 8, 1), (64, 64, 4, 2)),
    (256, True): ((32, 32, 8, 1), (32, 32, 8, 1), (64, 32, 4, 1)),
    (64, False): ((32, 32, 8, 1), (32, 32, 8, 1), (64, 32, 4, 1)),
}
QUERIES: Choice = {
    (32, True): ((64, 32, 8, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
    (64, True): ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    (128, True): ((32, 32, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1)),
    (256, True): ((16, 16, 8, 1), (64, 16, 8, 1), (32, 32, 4, 1)),
    (64, False): ((16, 16, 4, 1), (16, 16, 4, 1), (32, 16, 4, 1)),
}
KEYS: Choice = {
    (32, True): ((32, 32, 8, 1), (64, 64, 8, 1), (64, 64, 4, 1)),
    (32, False): ((32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (64, True): ((32, 32, 4, 1), (32, 64, 8, 1), (64, 64, 4, 1)),
    (128, True): ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 4, 1)),
    (256, True): ((32, 16, 8, 1), (32, 16, 8, 1), (16, 32, 4, 1)),
    (64, False): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1)),
}


def _choose(choice: Choice, width: int, dtype: torch.dtype) -> Blocks:
    """Wider rows than the table has, which only the interpreter meets, take the last of their kind."""
    narrow, here = dtype == torch.bfloat16, target()
    widths = [known for known, kind in choice if kind == narrow]
    fit = min((known for known in widths if known >= width), default=max(widths))
    column = 2 if here.backend == "hip" else int(int(here.arch) >= 90)
    return _blocks(*choice[fit, narrow][column])


def _turns(width: int, dtype: torch.dtype) -> list[dict[str, bool]]:
    """What launches make of the keys' gradients: wide rows leave registers for those of keys or of values alone."""
    if dtype == torch.bfloat16 and width <= 64:
        return [{"OF_KEYS": True, "OF_VALUES": True}]
    return [{"OF_KEYS": True, "OF_VALUES": False}, {"OF_KEYS": False, "OF_VALUES": True}]


def _constants(q: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    here, whole = target(), target().float32_dot
    return {
        "CAUSAL": causal,
        "WIDTH": q.shape[3],
        "VALUES": v.shape[3],
        "NARROW": q.dtype == torch.bfloat16,
        "COARSE": ("tf32" if here.backend == "cuda" else "bf16x3") if q.dtype == torch.float16 else whole,
        "FINE": whole,
        "BK": power_of_2(q.shape[3], 16),
        "BV": power_of_2(v.shape[3], 16),
    }


def _bounds(cu_seqlens: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For every place the first of its sequence and the first after it."""
    if cu_seqlens is None:
        return None, None
    bounds, steps = cu_seqlens.to(q.device, torch.int32), torch.arange(q.shape[2], device=q.device)
    all_bounds = torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), q.shape[2])])
    sequence = torch.bucketize(steps, bounds, right=True)
    return all_bounds.index_select(0, sequence), all_bounds.index_select(0, sequence + 1)


def softmax_read(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    causal: bool, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, times, width = q.shape
    signals = 1 if beta is None else 2
    mixed = q.new_empty((batch, times, heads, signals, v.shape[3]), dtype=torch.float32).transpose(1, 2)
    lse = q.new_empty((batch, heads, times), dtype=torch.float32)
    (q, k, v), mask = (
        (with_whole_rows(x) for x in (q, k, v)),
        None if key_mask is None else key_mask.contiguous(),
    )
    blocks = _choose(READ, max(width, v.shape[3]), q.dtype)
    blocks["M"] = min(blocks["M"], power_of_2(times, 16))
    launch(
        _softmax_read, (batch * heads, -(-times // blocks["M"])), mixed, lse, q, k, v,
        None if beta is None else beta.contiguous(), mask, *_bounds(cu_seqlens, q), width**-0.5, cap, heads,
        heads // max(1, k.shape[1]), times, k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], k.shape[2],
        *(mixed.stride(i) for i in (0, 1, 2, 3)), **_constants(q, v, causal), **blocks,
    )  # fmt: skip
    return mixed, lse


def softmax_read_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, key_mask: Tensor | None,
    cu_seqlens: Tensor | None, mixed: Tensor, lse: Tensor, causal: bool, cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, times, width), (groups, sources) = q.shape, k.shape[1:3]
    dq, dk, dv = (
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    q, k, v, mixed, dmixed = (with_whole_rows(x) for x in (q, k, v, mixed, dmixed))
    mask, rate = (
        None if key_mask is None else key_mask.contiguous(),
        None if beta is None else beta.contiguous(),
    )
    low, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    widest, share = max(width, v.shape[3]), heads // max(1, groups)
    of_queries, of_keys = (_choose(x, widest, q.dtype) for x in (QUERIES, KEYS))
    bounds, strides = _bounds(cu_seqlens, q), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], sources)
    of_grads, constants = dmixed.stride()[:4], _constants(q, v, causal)
    launch(
        _query_gradients, (batch * heads, -(-times // of_queries["M"])),
        dq, delta, dmixed, mixed, low, q, k, v, rate, mask,
        *bounds, width**-0.5, cap, heads, share, times, sources, *strides, *mixed.stride()[:4], *of_grads,
        *dq.stride()[:3], **constants, **of_queries,
    )  # fmt: skip
    blocks = -(-sources // of_keys["N"])
    parts = None if rate is None else rate.new_empty((batch * blocks, *rate.shape))
    for turn in _turns(widest, q.dtype):
        launch(
            _key_gradients, (batch * groups, blocks), dk, dv, parts, delta, dmixed, low, q, k, v, rate, mask, *bounds,
            width**-0.5, cap, groups, share, times, sources, *strides, *of_grads, *dk.stride()[:3], *dv.stride()[:3],
            **constants, **of_keys, **turn,
        )  # fmt: skip
    return dq, dk, dv, mixed.new_empty(0) if parts is None else parts.sum(0)


def _call(
    new: Any, dtype: torch.dtype, width: int, *, tilted: bool = True, packed: bool = False, masked: bool = False,
    causal: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    q, k, v = (new(1, heads, 256, width, dtype=dtype) for heads in (4, 2, 2))
    mask = new(1, 256, dtype=torch.bool) if masked else None
    bounds = new(3, dtype=torch.int32) if packed else None
    return q, k, v, new(2, width) if tilted else None, mask, bounds, causal, 40.0


def _backward_call(new: Any, dtype: torch.dtype, width: int, **options: bool) -> tuple[Any, ...]:
    *inputs, causal, cap = _call(new, dtype, width, **options)
    mixed, dmixed = (new(1, 4, 256, 1 if inputs[3] is None else 2, width) for _ in range(2))
    return dmixed, *inputs, mixed, new(1, 4, 256), causal, cap


CASES: list[tuple[str, torch.dtype, int, dict[str, bool]]] = [
    *((f"bf16 {width}", torch.bfloat16, width, {}) for width in (32, 64, 128, 256)),
    *((f"fp32 {width}", torch.float32, width, {}) for width in (32, 64)),
    *((f"fp16 {width}", torch.float16, width, {}) for width in (32, 64)),
    ("bf16 64 packed", torch.bfloat16, 64, {"packed": True}),
    ("bf16 128 packed", torch.bfloat16, 128, {"packed": True}),
    ("bf16 64 masked, all keys", torch.bfloat16, 64, {"masked": True, "causal": False}),
    ("bf16 128 masked, the mean", torch.bfloat16, 128, {"tilted": False, "masked": True}),
]
CALLS: dict[str, tuple[str, Any]] = {
    label: ("softmax_read", lambda new, c=case: _call(new, c[0], c[1], **c[2])) for label, *case in CASES
} | {
    f"{label} backward": (
        "softmax_read_backward",
        lambda new, c=case: _backward_call(new, c[0], c[1], **c[2]),
    )
    for label, *case in CASES
}
