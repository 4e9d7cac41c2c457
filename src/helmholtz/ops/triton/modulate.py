"""x + x s, taken apart. Floor: 2 numbers in and 1 out per channel forward, 3 in and 2 out backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import launch

ROWS, BLOCK = 8, 256
"""Tokens and channels of a block."""


@triton.jit
def _modulate(Parts, widths, Joint, Scale, rows_in_all, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, block = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.program_id(1)
    start = 0
    for i in tl.static_range(len(Parts)):
        blocks = tl.cdiv(widths[i], BLOCK)
        if (block >= 0) & (block < blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < rows_in_all) & (columns < widths[i])
            at = rows * width + start + columns
            x = tl.load(Joint + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(Scale + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(Parts[i] + rows * widths[i] + columns, x + x * s, mask=inside)
        block -= blocks
        start += widths[i]


@triton.jit
def _modulate_backward(
    Djoint, Dscale, Dparts, widths, strides_b, strides_t, Joint, Scale, rows_in_all, steps, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, block = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.program_id(1)
    start = 0
    for i in tl.static_range(len(Dparts)):
        blocks = tl.cdiv(widths[i], BLOCK)
        if (block >= 0) & (block < blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < rows_in_all) & (columns < widths[i])
            at = rows * width + start + columns
            x = tl.load(Joint + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(Scale + at, mask=inside, other=0.0).to(tl.float32)
            from_part = rows // steps * strides_b[i] + rows % steps * strides_t[i] + columns
            g = tl.load(Dparts[i] + from_part, mask=inside, other=0.0).to(tl.float32)
            tl.store(Djoint + at, g + g * s, mask=inside)
            tl.store(Dscale + at, g * x, mask=inside)
        block -= blocks
        start += widths[i]


def _grid(joint: Tensor, widths: Sequence[int]) -> tuple[int, int]:
    tokens = joint.shape[0] * joint.shape[1]
    return -(-tokens // ROWS), sum(-(-width // BLOCK) for width in widths)


def modulate(joint: Tensor, scale: Tensor, widths: Sequence[int]) -> list[Tensor]:
    batch, steps, width = joint.shape
    parts = [joint.new_empty((batch, steps, n)) for n in widths]
    launch(
        _modulate, _grid(joint, widths), tuple(parts), tuple(widths), joint.contiguous(), scale.contiguous(),
        batch * steps, width, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts


def modulate_backward(dparts: Sequence[Tensor], joint: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    batch, steps, width = joint.shape
    widths = tuple(x.shape[2] for x in dparts)
    rows = tuple(x if x.stride(2) == 1 else x.contiguous() for x in dparts)
    x, s = joint.contiguous(), scale.contiguous()
    djoint, dscale = torch.empty_like(x), torch.empty_like(s)
    launch(
        _modulate_backward, _grid(joint, widths), djoint, dscale, rows, widths, tuple(x.stride(0) for x in rows),
        tuple(x.stride(1) for x in rows), x, s, batch * steps, steps, width, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return djoint, dscale


WIDTHS = (768, 256, 64, 1)


def _call(new: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    return new(2, 64, sum(WIDTHS), dtype=dtype), new(2, 64, sum(WIDTHS), dtype=dtype)


def _backward_call(new: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    return [new(2, 64, width, dtype=dtype) for width in WIDTHS], *_call(new, dtype)


CALLS: dict[str, tuple[str, Any]] = {
    "bf16": ("modulate", lambda new: (*_call(new, torch.bfloat16), WIDTHS)),
    "fp32": ("modulate", lambda new: (*_call(new, torch.float32), WIDTHS)),
    "bf16 backward": ("modulate_backward", lambda new: _backward_call(new, torch.bfloat16)),
    "fp32 backward": ("modulate_backward", lambda new: _backward_call(new, torch.float32)),
}
