"""The two-level gated read. Floor: 5 numbers in and 1 out per channel forward, 6 in and 5 out backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import launch, places, power_of_2, sigmoid, softplus, with_whole_rows

NUMBERS, NUMBERS_BACKWARD = 2048, 1024
"""Of a block."""
LITTLE = torch.finfo(torch.float32).eps
"""The floor under the second gate's mean square, as torch's rms_norm has it."""


@triton.jit
def _unit(raw, eps, floor, inside, width):
    """A positive gate with mean square 1 along the rows, and the factor that makes it so."""
    u = tl.where(inside, softplus(raw) + eps, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / width + floor)
    return u * factor[:, None], factor[:, None]


@triton.jit
def _unit_backward(raw, gate, factor, dgate, width):
    along = tl.sum(dgate * gate, axis=1) / width
    return (dgate - gate * along[:, None]) * factor * sigmoid(raw)


@triton.jit
def _read(
    Y, Mixed, Beta, Inner, Outer, Own, eps, floor, rows_in_all, steps, heads, width, mixed_n,
    mixed_b, mixed_t, mixed_h, inner_b, inner_t, inner_h, outer_b, outer_t, outer_h, own_b, own_t, own_h,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (rows < rows_in_all)[:, None] & (columns < width)[None, :]
    at = places(rows, steps, mixed_b, mixed_t, mixed_h, head, columns)
    read = tl.load(Mixed + at, mask=inside, other=0.0)
    if Beta is not None:
        partition = tl.load(Mixed + mixed_n + at, mask=inside, other=0.0)
        beta = tl.load(Beta + head * width + columns, mask=columns < width, other=1.0)
        blind = tl.where(tl.max(partition, axis=1) > 0.0, 0.0, 1.0)[:, None]
        free = tl.log(tl.where(inside, partition + blind, 1.0)) / beta[None, :]
        if Inner is not None:
            inner_at = places(rows, steps, inner_b, inner_t, inner_h, head, columns)
            read += sigmoid(tl.load(Inner + inner_at, mask=inside, other=0.0).to(tl.float32)) * (free - read)
        else:
            read = free
    if Outer is not None:
        outer_at = places(rows, steps, outer_b, outer_t, outer_h, head, columns)
        gate, _ = _unit(
            tl.load(Outer + outer_at, mask=inside, other=0.0).to(tl.float32), eps, 0.0, inside, width
        )
        read *= gate
    if Own is not None:
        own_at = places(rows, steps, own_b, own_t, own_h, head, columns)
        gate, _ = _unit(
            tl.load(Own + own_at, mask=inside, other=0.0).to(tl.float32), eps, floor, inside, width
        )
        read *= gate
    to = (rows.to(tl.int64) * heads + head)[:, None] * width + columns[None, :]
    tl.store(Y + to, read, mask=inside)


@triton.jit
def _read_backward(
    Dy, Mixed, Beta, Inner, Outer, Own, Dmixed, Dbeta, Dinner, Douter, Down, eps, floor,
    rows_in_all, steps, heads, width, mixed_n, mixed_b, mixed_t, mixed_h, inner_b, inner_t, inner_h,
    outer_b, outer_t, outer_h, own_b, own_t, own_h, dy_b, dy_t, dy_h, dmixed_n, dmixed_b, dmixed_t, dmixed_h,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (rows < rows_in_all)[:, None] & (columns < width)[None, :]
    at = places(rows, steps, mixed_b, mixed_t, mixed_h, head, columns)
    to = (rows.to(tl.int64) * heads + head)[:, None] * width + columns[None, :]
    dmixed_at = places(rows, steps, dmixed_b, dmixed_t, dmixed_h, head, columns)
    dy_at = places(rows, steps, dy_b, dy_t, dy_h, head, columns)
    mean = tl.load(Mixed + at, mask=inside, other=0.0)
    read, lam = mean, 1.0
    if Beta is not None:
        partition = tl.load(Mixed + mixed_n + at, mask=inside, other=0.0)
        beta = tl.load(Beta + head * width + columns, mask=columns < width, other=1.0)[None, :]
        blind = tl.where(tl.max(partition, axis=1) > 0.0, 0.0, 1.0)[:, None]
        seen = tl.where(inside, partition + blind, 1.0)
        free = tl.log(seen) / beta
        read = free
        if Inner is not None:
            inner_at = places(rows, steps, inner_b, inner_t, inner_h, head, columns)
            lam = sigmoid(tl.load(Inner + inner_at, mask=inside, other=0.0).to(tl.float32))
            read = mean + lam * (free - mean)
    g = tl.load(Dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    along, scaled = g * read, g
    if Outer is not None:
        outer_at = places(rows, steps, outer_b, outer_t, outer_h, head, columns)
        raw_outer = tl.load(Outer + outer_at, mask=inside, other=0.0).to(tl.float32)
        outer, outer_factor = _unit(raw_outer, eps, 0.0, inside, width)
        scaled *= outer
    if Own is not None:
        own_at = places(rows, steps, own_b, own_t, own_h, head, columns)
        raw_own = tl.load(Own + own_at, mask=inside, other=0.0).to(tl.float32)
        own, own_factor = _unit(raw_own, eps, floor, inside, width)
        scaled *= own
        downs = along
        if Outer is not None:
            downs = along * outer
        tl.store(Down + to, _unit_backward(raw_own, own, own_factor, downs, width), mask=inside)
    if Outer is not None:
        douters = along
        if Own is not None:
            douters = along * own
        tl.store(Douter + to, _unit_backward(raw_outer, outer, outer_factor, douters, width), mask=inside)
    if Beta is None:
        tl.store(Dmixed + dmixed_at, scaled, mask=inside)
    else:
        dfree = scaled * lam
        dlog = dfree / beta
        tl.store(Dmixed + dmixed_at, scaled - dfree, mask=inside)
        tl.store(Dmixed + dmixed_n + dmixed_at, (1.0 - blind) * dlog / seen, mask=inside)
        drate = -tl.sum(tl.where(inside, dlog * free, 0.0), axis=0)
        tl.store(Dbeta + (tl.program_id(0) * heads + head) * width + columns, drate, mask=columns < width)
        if Inner is not None:
            tl.store(Dinner + to, dfree * (1.0 - lam) * (free - mean), mask=inside)


def _blocks(mixed: Tensor, numbers: int) -> tuple[tuple[int, int], dict[str, int]]:
    batch, steps, heads, _, width = mixed.shape
    block = power_of_2(width, 16)
    rows = max(1, numbers // block)
    return (-(-batch * steps // rows), heads), {"ROWS": rows, "BLOCK": block, "num_warps": 4}


def _inputs(mixed: Tensor, *gates: Tensor | None) -> tuple[list[Any], list[int]]:
    """In whole rows, and their strides: signal, batch, step, head of the averages; the last three of gates."""
    mixed = with_whole_rows(mixed)
    laid: list[Any] = [None if x is None else with_whole_rows(x) for x in gates]
    strides = [mixed.stride(3), *mixed.stride()[:3]]
    for x in laid:
        strides += (
            [0, 0, 0] if x is None else [*x.stride()[:2], x.stride(2) if x.dim() == 4 else mixed.shape[4]]
        )
    return [mixed, *laid], strides


def gated_read(
    mixed: Tensor,
    beta: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    own: Tensor | None,
    eps: float,
) -> Tensor:
    batch, steps, heads, _, width = mixed.shape
    stored = next((x.dtype for x in (inner, outer, own) if x is not None), mixed.dtype)
    y = mixed.new_empty((batch, steps, heads, width), dtype=stored)
    (mixed, *gates), strides = _inputs(mixed, inner, outer, own)
    grid, blocks = _blocks(mixed, NUMBERS)
    rate = None if beta is None else beta.contiguous()
    sizes = batch * steps, steps, heads, width
    launch(_read, grid, y, mixed, rate, *gates, eps, LITTLE, *sizes, *strides, **blocks)
    return y


def gated_read_backward(
    dy: Tensor, mixed: Tensor, beta: Tensor | None, inner: Tensor | None, outer: Tensor | None, own: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, steps, heads, _, width = mixed.shape
    (mixed, *gates), strides = _inputs(mixed, inner, outer, own)
    dy, (grid, blocks) = with_whole_rows(dy), _blocks(mixed, NUMBERS_BACKWARD)
    dmixed = torch.empty_like(mixed)
    dgates = [None if x is None else x.new_empty(x.shape) for x in gates]
    rate = None if beta is None else beta.contiguous()
    parts = None if rate is None else rate.new_empty((grid[0], heads, width))
    sizes = batch * steps, steps, heads, width
    of_gradients = *dy.stride()[:3], dmixed.stride(3), *dmixed.stride()[:3]
    launch(
        _read_backward, grid, dy, mixed, rate, *gates, dmixed, parts, *dgates, eps, LITTLE, *sizes, *strides,
        *of_gradients, **blocks,
    )  # fmt: skip
    dbeta = None if parts is None else parts.sum(0)
    return dmixed, *(mixed.new_empty(0) if x is None else x for x in (dbeta, *dgates))


def _call(new: Any, dtype: torch.dtype, width: int, *, own: bool = False) -> tuple[Any, ...]:
    mixed = new(2, 64, 3, 2, width)
    inner, outer = new(2, 64, 3, width, dtype=dtype), new(2, 64, 3 * width, dtype=dtype)
    return mixed, new(3, width), inner, outer, new(2, 64, 3, width, dtype=dtype) if own else None, 1e-6


def _mean_call(new: Any, dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    return new(2, 64, 1, 1, width), None, None, None, new(2, 64, 1, width, dtype=dtype), 0.0


CALLS: dict[str, tuple[str, Any]] = {
    "bf16 64": ("gated_read", lambda new: _call(new, torch.bfloat16, 64)),
    "fp32 64 own": ("gated_read", lambda new: _call(new, torch.float32, 64, own=True)),
    "fp16 256": ("gated_read", lambda new: _call(new, torch.float16, 256)),
    "bf16 2048 mean": ("gated_read", lambda new: _mean_call(new, torch.bfloat16, 2048)),
    "bf16 64 backward": (
        "gated_read_backward",
        lambda new: (new(2, 64, 3, 64, dtype=torch.bfloat16), *_call(new, torch.bfloat16, 64)),
    ),
    "fp32 64 own backward": (
        "gated_read_backward",
        lambda new: (new(2, 64, 3, 64), *_call(new, torch.float32, 64, own=True)),
    ),
    "fp16 256 backward": (
        "gated_read_backward",
        lambda new: (new(2, 64, 3, 256, dtype=torch.float16), *_call(new, torch.float16, 256)),
    ),
    "bf16 2048 mean backward": (
        "gated_read_backward",
        lambda new: (new(2, 64, 1, 2048, dtype=torch.bfloat16), *_mean_call(new, torch.bfloat16, 2048)),
    ),
}
