"""The signals v and exp(clip(beta v)). Floor: 1 number in and 2 out per channel forward, 3 in and 1 out backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import clipped, launch, places, power_of_2, with_whole_rows

NUMBERS = 2048
"""Of a block."""


@triton.jit
def _tilt(
    Signals, V, Beta, cap, rows_in_all, steps, width, to_b, to_t, to_g, to_n, v_b, v_t, v_g,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < rows_in_all)[:, None] & (columns < width)[None, :]
    v = tl.load(V + places(rows, steps, v_b, v_t, v_g, head, columns), mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(Beta + head * width + columns, mask=columns < width, other=0.0)
    to = Signals + places(rows, steps, to_b, to_t, to_g, head, columns)
    tl.store(to, v, mask=inside)
    tl.store(to + to_n, tl.exp(clipped(beta[None, :] * v, cap)), mask=inside)


@triton.jit
def _tilt_backward(
    Dv, Dbeta, Dsignals, V, Beta, cap, rows_in_all, steps, heads, width, from_b, from_t, from_g, from_n, v_b, v_t, v_g,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < rows_in_all)[:, None] & (columns < width)[None, :]
    v = tl.load(V + places(rows, steps, v_b, v_t, v_g, head, columns), mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(Beta + head * width + columns, mask=columns < width, other=0.0)[None, :]
    grads = Dsignals + places(rows, steps, from_b, from_t, from_g, head, columns)
    dvalue, dtilt = tl.load(grads, mask=inside, other=0.0), tl.load(grads + from_n, mask=inside, other=0.0)
    x = beta * v
    dx = tl.where(tl.abs(x) < cap, dtilt * tl.exp(x), 0.0)
    to = (rows.to(tl.int64) * heads + head)[:, None] * width + columns[None, :]
    tl.store(Dv + to, dvalue + dx * beta, mask=inside)
    part = (tl.program_id(0) * heads + head) * width + columns
    tl.store(Dbeta + part, tl.sum(dx * v, axis=0), mask=columns < width)


def _blocks(v: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, groups, steps, width = v.shape
    block = min(power_of_2(width, 16), NUMBERS)
    rows = NUMBERS // block
    grid = -(-batch * steps // rows), groups, -(-width // block)
    return grid, {"ROWS": rows, "BLOCK": block, "num_warps": 4}


def tilt(v: Tensor, beta: Tensor, cap: float, apart: bool) -> Tensor:
    batch, groups, steps, width = v.shape
    if apart:
        signals = beta.new_empty((batch, steps, 2, groups, width)).permute(0, 3, 1, 2, 4)
    else:
        signals = beta.new_empty((batch, steps, groups, 2, width)).transpose(1, 2)
    x, (grid, blocks) = with_whole_rows(v), _blocks(v)
    b, g, t, n, _ = signals.stride()
    strides = b, t, g, n, x.stride(0), x.stride(2), x.stride(1)
    launch(_tilt, grid, signals, x, beta.contiguous(), cap, batch * steps, steps, width, *strides, **blocks)
    return signals


def tilt_backward(dsignals: Tensor, v: Tensor, beta: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    batch, groups, steps, width = v.shape
    x, grads, (grid, blocks) = with_whole_rows(v), with_whole_rows(dsignals), _blocks(v)
    dv = v.new_empty((batch, steps, groups, width))
    parts = beta.new_empty((grid[0], groups, width))
    b, g, t, n, _ = grads.stride()
    launch(
        _tilt_backward, grid, dv, parts, grads, x, beta.contiguous(), cap, batch * steps, steps, groups, width,
        b, t, g, n, x.stride(0), x.stride(2), x.stride(1), **blocks,
    )  # fmt: skip
    return dv.transpose(1, 2), parts.sum(0)


def _call(new: Any, dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    return new(2, 3, 64, width, dtype=dtype), new(3, width), 40.0


def _backward_call(new: Any, dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    return new(2, 3, 64, 2, width), *_call(new, dtype, width)


CALLS: dict[str, tuple[str, Any]] = {
    "bf16 64": ("tilt", lambda new: (*_call(new, torch.bfloat16, 64), True)),
    "fp32 256": ("tilt", lambda new: (*_call(new, torch.float32, 256), False)),
    "bf16 64 backward": ("tilt_backward", lambda new: _backward_call(new, torch.bfloat16, 64)),
    "fp32 256 backward": ("tilt_backward", lambda new: _backward_call(new, torch.float32, 256)),
}
