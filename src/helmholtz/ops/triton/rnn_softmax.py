"""Running softmax averages per channel (AFT), in units of the largest key so far.

The running maximum m is a scan (by sequence: a restart forgets), and of it come two numbers a step, each at most 1:
what the sums before are multiplied by, ``e^{m_{t-1} - m_t}``, and the weight of what is added, ``e^{k_t - m_t}``. The
signals and, last, one of ones, whose sum is the weights', are then one first-order scan (`scan.then`) of S + 1 lanes. A
program takes a row and a block of channels and goes through time in tiles, each scanned in parallel. No key after a
step enters its maximum. Backward is the scan from the end, with the factors one step later; the maximum is a constant
to it:

    c_t = G_t + e^{m_t - m_{t+1}} c_{t+1},  G = dy / mass and, of the weights, -sum dy y / mass:
    dx_t = c_t e^{k_t - m_t},  dk_t = e^{k_t - m_t} (sum_s c_ts x_ts + c_t of the weights).

Floor: S + 1 numbers in and S + 3 out per step and channel forward, 2 S + 3 in and S + 1 out backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import launch, power_of_2
from helmholtz.ops.triton.scan import row_of, then

STEPS, BLOCK, WARPS = 16, 32, 8
"""Of a tile: steps, channels."""
FLOOR = tl.constexpr(torch.finfo(torch.float32).min)
"""Finite: a row without any weight subtracts to 0 and not to NaN."""


@triton.jit
def _larger(fresh, key, next_fresh, next_key):
    """Two spans' largest keys as one's: of the second alone, if it starts again."""
    return fresh | next_fresh, tl.where((next_fresh > 0) | (next_key > key), next_key, key)


@triton.jit
def _keys(K, at, inside):
    key = tl.load(K + at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(key < FLOOR, FLOOR, key)  # NaN stays


@triton.jit
def _tops(K, Reset, time, steps, row, channels, width, before, first):
    """The largest key so far at ``time``, of a tile that begins at ``first`` and before which it was ``before``."""
    real = (time >= first) & (time < steps)
    at = (row * steps + time)[:, None] * width + channels[None, :]
    key = _keys(K, at, real[:, None] & (channels < width)[None, :])
    fresh = tl.zeros_like(time).to(tl.int32)
    if Reset is not None:
        fresh = tl.load(Reset + row * steps + time, mask=real, other=0).to(tl.int32)
    start = (time == tl.min(time))[:, None]
    older = start & (fresh == 0)[:, None] & ~(before[None, :] <= key)  # so that NaN stays
    key = tl.where(older, before[None, :], key)
    _, top = tl.associative_scan((fresh[:, None] + tl.zeros_like(key).to(tl.int32), key), 0, _larger)
    return top


@triton.jit
def _average(
    K, X, First, Start, Reset, Y, Top, Inverse, Last, steps, width,
    SIGNALS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, lanes = channels < width, tl.arange(0, LANES)
    of_sums = (row * (SIGNALS + 1) + lanes)[:, None] * width + channels[None, :]
    summed = (lanes <= SIGNALS)[:, None] & inside[None, :]
    sums = tl.load(Start + of_sums, mask=summed, other=0.0)
    m = tl.load(First + row * width + channels, mask=inside, other=FLOOR)
    m = tl.where(m < FLOOR, FLOOR, m)
    of_mass = (lanes == SIGNALS)[None, :, None]
    for first in range(0, steps, STEPS):
        time = first + tl.arange(0, STEPS).to(tl.int64)
        real = (time < steps)[:, None] & inside[None, :]
        at = (row * steps + time)[:, None] * width + channels[None, :]
        key = _keys(K, at, real)
        top = _tops(K, Reset, time, steps, row, channels, width, m, first)
        before = _tops(K, Reset, time - 1, steps, row, channels, width, m, first)
        decay, weight = tl.exp(before - top), tl.where(key <= FLOOR, 0.0, tl.exp(key - top))
        if Reset is not None:
            fresh = tl.load(Reset + row * steps + time, mask=time < steps, other=0) != 0
            decay = tl.where(fresh[:, None], 0.0, decay)
        x_at = ((row * steps + time)[:, None, None] * SIGNALS + lanes[None, :, None]) * width + channels[
            None, None, :
        ]
        given = real[:, None, :] & (lanes < SIGNALS)[None, :, None]
        x = tl.where(of_mass, 1.0, tl.load(X + x_at, mask=given, other=0.0)) * weight[:, None, :]
        decays = decay[:, None, :] + tl.zeros_like(x)
        x = tl.where((time == first)[:, None, None], decays * sums[None, :, :] + x, x)
        _, total = tl.associative_scan((decays, x), 0, then)
        final = (time == first + STEPS - 1)[:, None]
        sums, m = row_of(total, final[:, :, None]), row_of(top, final)
        mass = tl.sum(tl.where(of_mass, total, 0.0), axis=1)
        inverse = tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
        tl.store(Top + at, top, mask=real)
        tl.store(Inverse + at, inverse, mask=real)
        tl.store(Y + x_at, total * inverse[:, None, :], mask=given)
    tl.store(Last + of_sums, sums, mask=summed)


@triton.jit
def _average_back(
    Dy, Dlast, K, X, First, Reset, Y, Top, Inverse, Dk, Dx, Dstart, steps, width,
    SIGNALS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the last step to one before the first, whose gradient is that of the sums that came in."""
    row, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, lanes = channels < width, tl.arange(0, LANES)
    of_sums = (row * (SIGNALS + 1) + lanes)[:, None] * width + channels[None, :]
    summed = (lanes <= SIGNALS)[:, None] & inside[None, :]
    carry = tl.zeros([LANES, BLOCK], tl.float32)
    if Dlast is not None:
        carry = tl.load(Dlast + of_sums, mask=summed, other=0.0)
    m = tl.load(First + row * width + channels, mask=inside, other=FLOOR)
    m = tl.where(m < FLOOR, FLOOR, m)[None, :]
    of_mass = (lanes == SIGNALS)[None, :, None]
    for first in range(0, steps + 1, STEPS):
        time = steps - 1 - first - tl.arange(0, STEPS).to(tl.int64)
        real, later = (time >= 0)[:, None] & inside[None, :], (time >= -1) & (time < steps - 1)
        at = (row * steps + time)[:, None] * width + channels[None, :]
        top = tl.where((time >= 0)[:, None], tl.load(Top + at, mask=real, other=0.0), m)
        after = tl.load(Top + at + width, mask=later[:, None] & inside[None, :], other=0.0)
        decay = tl.where(later[:, None], tl.exp(top - after), 1.0)
        if Reset is not None:
            fresh = tl.load(Reset + row * steps + time + 1, mask=later, other=0) != 0
            decay = tl.where(fresh[:, None], 0.0, decay)
        x_at = ((row * steps + time)[:, None, None] * SIGNALS + lanes[None, :, None]) * width + channels[
            None, None, :
        ]
        given = real[:, None, :] & (lanes < SIGNALS)[None, :, None]
        g = (
            tl.load(Dy + x_at, mask=given, other=0.0)
            * tl.load(Inverse + at, mask=real, other=0.0)[:, None, :]
        )
        shared = tl.sum(g * tl.load(Y + x_at, mask=given, other=0.0), axis=1)
        g = tl.where(of_mass, -shared[:, None, :], g)
        decays = decay[:, None, :] + tl.zeros_like(g)
        start = (time == steps - 1 - first)[:, None, None]
        g = tl.where(start, decays * carry[None, :, :] + g, g)
        _, c = tl.associative_scan((decays, g), 0, then)
        final = (time == tl.maximum(steps - first - STEPS, -1))[:, None, None]
        carry = row_of(c, final)
        key = _keys(K, at, real)
        weight = tl.where(key <= FLOOR, 0.0, tl.exp(key - top))
        x = tl.where(of_mass, 1.0, tl.load(X + x_at, mask=given, other=0.0))
        tl.store(Dx + x_at, c * weight[:, None, :], mask=given)
        tl.store(Dk + at, tl.sum(tl.where(summed[None, :, :], c * x, 0.0), axis=1) * weight, mask=real)
    tl.store(Dstart + of_sums, carry, mask=summed)


def _launch(kernel: Any, *arguments: Any, like: Tensor) -> None:
    batch, steps, signals, width = like.shape
    launch(
        kernel, (batch, -(-width // BLOCK)), *arguments, steps, width,
        SIGNALS=signals, LANES=power_of_2(signals + 1), STEPS=STEPS, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def rnn_softmax(
    k: Tensor, signals: Tensor, max: Tensor, sums: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, x, first, start = k.contiguous(), signals.contiguous(), max.contiguous(), sums.contiguous()
    averaged, last = torch.empty_like(x), torch.empty_like(start)
    top, inverse = x.new_empty(k.shape), x.new_empty(k.shape)
    fresh = None if reset is None else reset.contiguous()
    _launch(_average, k, x, first, start, fresh, averaged, top, inverse, last, like=x)
    return averaged, last, top, inverse


def rnn_softmax_backward(
    daveraged: Tensor, dlast: Tensor | None, k: Tensor, signals: Tensor, max: Tensor, reset: Tensor | None,
    averaged: Tensor, top: Tensor, inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, number, width = signals.shape
    dy, k, x, first = daveraged.contiguous(), k.contiguous(), signals.contiguous(), max.contiguous()
    dk, dx, dsums = torch.empty_like(k), torch.empty_like(x), x.new_empty((batch, number + 1, width))
    carry = None if dlast is None else dlast.contiguous()
    fresh = None if reset is None else reset.contiguous()
    results = averaged.contiguous(), top.contiguous(), inverse.contiguous()
    _launch(_average_back, dy, carry, k, x, first, fresh, *results, dk, dx, dsums, like=x)
    return dk, dx, dsums


def _call(new: Any, dtype: torch.dtype, signals: int, packed: bool) -> tuple[Any, ...]:
    reset = new(2, 64, dtype=torch.bool) if packed else None
    x = new(2, 64, signals, 96)
    return new(2, 64, 96, dtype=dtype), x, new(2, 96), new(2, signals + 1, 96), reset


def _backward_call(new: Any, *sort: Any) -> tuple[Any, ...]:
    k, x, first, sums, reset = _call(new, *sort)
    return x, sums, k, x, first, reset, x, new(2, 64, 96), new(2, 64, 96)


_SORTS = {
    "bf16 2 signals": (torch.bfloat16, 2, False),
    "bf16 2 signals packed": (torch.bfloat16, 2, True),
    "fp32 1 signal": (torch.float32, 1, False),
    "fp16 3 signals packed": (torch.float16, 3, True),
}
CALLS: dict[str, tuple[str, Any]] = {}
for _label, _sort in _SORTS.items():
    CALLS[_label] = ("rnn_softmax", lambda new, s=_sort: _call(new, *s))
    CALLS[_label + " backward"] = ("rnn_softmax_backward", lambda new, s=_sort: _backward_call(new, *s))
