"""The selective scan: N states for each of S signals per channel, decays shared by the signals.

Three phases over chunks of 32 steps: what each chunk makes of no state, all at once, by how much of each step is left
at its end, ``e^{A (delta summed over the steps after it)}``; the states before the chunks, one after another but all
numbers at once; all else from these, all chunks at once. There a program has a block of 16 channels in a chunk and goes
through the states, each a first-order scan over the chunk (`scan.then`) of all its signals. Backward takes the gradient
of the states after the chunks by the same three phases from the end; inside a chunk it scans both ways.

With `normalize` a signal of ones is one more lane, by whose result the others are divided. Sums of step sizes are made
of just the steps between, never as differences; a restart is a decay of 0.

Floor: T C N exponentials and 4 T C N S operations forward, 3 times as much backward; here twice the exponentials, and
N S numbers of state per 32 steps and channel written, carried and read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.kernels.operators import BLOCK, KEPT, _signals
from helmholtz.ops.triton._shared import launch, power_of_2, with_whole_rows
from helmholtz.ops.triton.scan import then

WARPS, WARPS_BACK, NUMBERS = 4, 8, 256
"""And numbers of state that a program carries along."""


@triton.jit
def _fresh(Reset, time, row, steps, real):
    if Reset is None:
        return (time < 0) & real
    else:
        return tl.load(Reset + row * steps + time, mask=real, other=0) != 0


@triton.jit
def _signal(U, at, time, lanes, steps, inside, u_t, u_s, SIGNALS: tl.constexpr, NORMALIZE: tl.constexpr):
    """steps x lanes x channels, the last lane of ones."""
    given = (time < steps)[:, None, None] & (lanes < SIGNALS)[None, :, None] & inside[None, None, :]
    u_at = time[:, None, None] * u_t + lanes[None, :, None] * u_s + at[None, None, :]
    u = tl.load(U + u_at, mask=given, other=0.0).to(tl.float32)
    if NORMALIZE:
        u = tl.where((lanes == SIGNALS)[None, :, None] & (time < steps)[:, None, None], 1.0, u)
    return u


@triton.jit
def _gradient(Dy, Y, Mass, at, y_at, time, lanes, steps, row, channels, inside, width, d_t, d_s, y_t, y_s,
              SIGNALS: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
    """Of every signal's sum; of quotients by the last, if they were divided."""
    g = _signal(Dy, at, time, lanes, steps, inside, d_t, d_s, SIGNALS, False)
    if NORMALIZE:
        real = (time < steps)[:, None] & inside[None, :]
        mass = tl.load(Mass + (row * steps + time)[:, None] * width + channels[None, :], mask=real, other=1.0)
        g /= mass[:, None, :]
        y = _signal(Y, y_at, time, lanes, steps, inside, y_t, y_s, SIGNALS, False)
        g = tl.where((lanes == SIGNALS)[None, :, None], -tl.sum(g * y, axis=1)[:, None, :], g)
    return g


@triton.jit
def _add(
    X, Delta, Rates, Bs, Reset, Y, Mass, Kept, steps, width, states, head_width, x_b, x_t, x_s, x_h, y_b, y_t, y_s, y_h,
    BACKWARD: tl.constexpr, SIGNALS: tl.constexpr, NORMALIZE: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a chunk makes of no state: sums of ``delta_t b_t u_t`` by what is left of them at its end; backward, what
    its reads give to the gradient of the state before it: of ``c_t g_t`` by what is left of that state at t."""
    row, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    channels, lanes = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    inside, time = channels < width, chunk * STEPS + tl.arange(0, STEPS)
    real = (time < steps)[:, None] & inside[None, :]
    head, column = (channels // head_width).to(tl.int64), channels % head_width
    x_at = row * x_b + head * x_h + column
    fresh = _fresh(Reset, time, row, steps, time < steps)
    delta = tl.load(Delta + (row * steps + time)[:, None] * width + channels[None, :], mask=real, other=0.0)
    if BACKWARD:
        y_at = row * y_b + head * y_h + column
        x = _gradient(
            X, Y, Mass, x_at, y_at, time, lanes, steps, row, channels, inside, width, x_t, x_s, y_t, y_s,
            SIGNALS, NORMALIZE,
        )  # fmt: skip
        passed, cut = tl.cumsum(delta, 0), tl.cumsum(fresh.to(tl.int32), 0) > 0
    else:
        x = _signal(X, x_at, time, lanes, steps, inside, x_t, x_s, SIGNALS, NORMALIZE) * delta[:, None, :]
        later = (time + 1 < chunk * STEPS + STEPS) & (time + 1 < steps)
        next_at = (row * steps + time + 1)[:, None] * width + channels[None, :]
        after = tl.load(Delta + next_at, mask=later[:, None] & inside[None, :], other=0.0)
        passed = tl.cumsum(after, 0, reverse=True)
        cut = tl.cumsum(_fresh(Reset, time + 1, row, steps, later).to(tl.int32), 0, reverse=True) > 0
    x = tl.where(cut[:, None, None], 0.0, x)
    size = states * (SIGNALS + NORMALIZE) * BLOCK
    Kept += ((row * tl.num_programs(2) + block) * tl.num_programs(1) + chunk) * size
    to = lanes[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for n in range(states):
        rate = tl.load(Rates + channels * states + n, mask=inside, other=0.0)
        b = tl.load(Bs + (row * steps + time) * states + n, mask=time < steps, other=0.0)
        left = tl.exp(passed * rate[None, :]) * b[:, None]
        added = tl.sum(x * left[:, None, :], axis=0)
        tl.store(
            Kept + n * (SIGNALS + NORMALIZE) * BLOCK + to, added, mask=(lanes < SIGNALS + NORMALIZE)[:, None]
        )


@triton.jit
def _carry(
    Kept, First, Final, Delta, Rates, Reset, steps, chunks, width, states, all_signals,
    BACKWARD: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Puts in the place of what each chunk makes of nothing the state before it (its gradient after it)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.program_id(2) * NUMBERS + tl.arange(0, NUMBERS)
    size, time = states * all_signals * BLOCK, tl.arange(0, STEPS).to(tl.int64)
    n, signal, channel = at // (all_signals * BLOCK), at // BLOCK % all_signals, block * BLOCK + at % BLOCK
    inside = (at < size) & (channel < width)
    outside = ((row * all_signals + signal) * width + channel) * states + n
    s = tl.load(First + outside, mask=inside, other=0.0)
    rate = tl.load(Rates + channel * states + n, mask=inside, other=0.0)
    Kept += (row * tl.num_programs(1) + block) * chunks * size + at
    own = block * BLOCK + tl.arange(0, BLOCK)
    mine = (at % BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    for i in range(chunks):
        chunk = chunks - 1 - i if BACKWARD else i
        places = chunk * STEPS + time
        real = (places < steps)[:, None] & (own < width)[None, :]
        delta = tl.load(Delta + (row * steps + places)[:, None] * width + own[None, :], mask=real, other=0.0)
        total = tl.sum(tl.where(mine, tl.sum(delta, axis=0)[None, :], 0.0), axis=1)
        restarts = tl.sum(_fresh(Reset, places, row, steps, places < steps).to(tl.int32), axis=0)
        added = tl.load(Kept + chunk * size, mask=at < size, other=0.0)
        tl.store(Kept + chunk * size, s, mask=at < size)
        s = tl.where(restarts > 0, 0.0, tl.exp(total * rate)) * s + added
    tl.store(Final + outside, s, mask=inside)


@triton.jit
def _read(
    U, Delta, Rates, Bs, Cs, Skip, Reset, Kept, Y, Mass, steps, width, states, head_width, u_b, u_t, u_s, u_h,
    y_b, y_t, y_s, y_h,
    SIGNALS: tl.constexpr, NORMALIZE: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    channels, lanes = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    inside, time = channels < width, chunk * STEPS + tl.arange(0, STEPS)
    real = (time < steps)[:, None] & inside[None, :]
    head, column = (channels // head_width).to(tl.int64), channels % head_width
    fresh = _fresh(Reset, time, row, steps, time < steps)[:, None]
    of_steps = (row * steps + time)[:, None] * width + channels[None, :]
    delta = tl.load(Delta + of_steps, mask=real, other=0.0)
    u = _signal(U, row * u_b + head * u_h + column, time, lanes, steps, inside, u_t, u_s, SIGNALS, NORMALIZE)
    y = tl.zeros([STEPS, LANES, BLOCK], tl.float32)
    if Skip is not None:
        y += u * tl.load(Skip + channels, mask=inside, other=0.0)[None, None, :]
    u *= delta[:, None, :]
    Kept += (
        ((row * tl.num_programs(2) + block) * tl.num_programs(1) + chunk)
        * states
        * (SIGNALS + NORMALIZE)
        * BLOCK
    )
    stored, at = (lanes < SIGNALS + NORMALIZE)[:, None], lanes[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = (tl.arange(0, STEPS) == 0)[:, None, None]
    for n in range(states):
        rate = tl.load(Rates + channels * states + n, mask=inside, other=0.0)
        b = tl.load(Bs + (row * steps + time) * states + n, mask=time < steps, other=0.0)
        c = tl.load(Cs + (row * steps + time) * states + n, mask=time < steps, other=0.0)
        before = tl.load(Kept + n * (SIGNALS + NORMALIZE) * BLOCK + at, mask=stored, other=0.0)
        decay = tl.where(fresh, 0.0, tl.exp(delta * rate[None, :]))[:, None, :] + tl.zeros_like(u)
        x = u * b[:, None, None]
        x = tl.where(start, decay * before[None, :, :] + x, x)
        _, h = tl.associative_scan((decay, x), 0, then)
        y += h * c[:, None, None]
    if NORMALIZE:
        mass = tl.sum(tl.where((lanes == SIGNALS)[None, :, None], y, 0.0), axis=1)
        tl.store(Mass + of_steps, mass, mask=real)
        y /= tl.where(real, mass, 1.0)[:, None, :]
    given = real[:, None, :] & (lanes < SIGNALS)[None, :, None]
    to = (
        time[:, None, None] * y_t
        + lanes[None, :, None] * y_s
        + (row * y_b + head * y_h + column)[None, None, :]
    )
    tl.store(Y + to, y, mask=given)


@triton.jit
def _back(
    U, Delta, Rates, Bs, Cs, Skip, Reset, Kept, Dkept, Dy, Y, Mass, Du, Ddelta, Drates, Db, Dc, Dskip,
    steps, width, states, head_width, u_b, u_t, u_s, u_h, d_b, d_t, d_s, d_h, y_b, y_t, y_s, y_h,
    du_b, du_t, du_s, du_h,
    SIGNALS: tl.constexpr, NORMALIZE: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    channels, lanes = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    inside, place = channels < width, tl.arange(0, STEPS)
    time = chunk * STEPS + place
    real = (time < steps)[:, None] & inside[None, :]
    head, column = (channels // head_width).to(tl.int64), channels % head_width
    of_steps = (row * steps + time)[:, None] * width + channels[None, :]
    delta = tl.load(Delta + of_steps, mask=real, other=0.0)
    fresh = _fresh(Reset, time, row, steps, time < steps)[:, None]
    later = (place < STEPS - 1) & (time + 1 < steps)
    next_delta = tl.load(Delta + of_steps + width, mask=later[:, None] & inside[None, :], other=0.0)
    next_fresh = _fresh(Reset, time + 1, row, steps, later)[:, None]
    u = _signal(U, row * u_b + head * u_h + column, time, lanes, steps, inside, u_t, u_s, SIGNALS, NORMALIZE)
    last = tl.maximum(time - 1, 0)  # the first of a chunk takes the state before it instead
    last_at = (row * steps + last)[:, None] * width + channels[None, :]
    last_delta = tl.load(Delta + last_at, mask=(last < steps)[:, None] & inside[None, :], other=0.0)
    last_fresh = _fresh(Reset, last, row, steps, last < steps)[:, None]
    last_u = _signal(
        U, row * u_b + head * u_h + column, last, lanes, steps, inside, u_t, u_s, SIGNALS, NORMALIZE
    )
    g = _gradient(
        Dy, Y, Mass, row * d_b + head * d_h + column, row * y_b + head * y_h + column, time, lanes, steps, row,
        channels, inside, width, d_t, d_s, y_t, y_s, SIGNALS, NORMALIZE,
    )  # fmt: skip
    part = (row * tl.num_programs(2) + block) * tl.num_programs(1) + chunk
    size = (SIGNALS + NORMALIZE) * BLOCK
    Kept, Dkept = Kept + part * states * size, Dkept + part * states * size
    stored, at = (lanes < SIGNALS + NORMALIZE)[:, None], lanes[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    du, ddelta = tl.zeros([STEPS, LANES, BLOCK], tl.float32), tl.zeros([STEPS, BLOCK], tl.float32)
    start, end = (place == 0)[:, None, None], (place == STEPS - 1)[:, None, None]
    sums = (block * tl.num_programs(0) + row) * steps + time
    for n in range(states):
        rate = tl.load(Rates + channels * states + n, mask=inside, other=0.0)
        b = tl.load(Bs + (row * steps + time) * states + n, mask=time < steps, other=0.0)
        c = tl.load(Cs + (row * steps + time) * states + n, mask=time < steps, other=0.0)
        before = tl.load(Kept + n * size + at, mask=stored, other=0.0)[None, :, :]
        after = tl.load(Dkept + n * size + at, mask=stored, other=0.0)[None, :, :]
        decay = tl.where(fresh, 0.0, tl.exp(delta * rate[None, :]))
        decays = decay[:, None, :] + tl.zeros_like(u)
        x = u * (delta[:, None, :] * b[:, None, None])
        last_decay = tl.where(last_fresh, 0.0, tl.exp(last_delta * rate[None, :]))
        last_b = tl.load(Bs + (row * steps + last) * states + n, mask=last < steps, other=0.0)
        last_x = tl.where(start, before, last_u * (last_delta[:, None, :] * last_b[:, None, None]))
        _, held = tl.associative_scan((last_decay[:, None, :] + tl.zeros_like(u), last_x), 0, then)
        held *= decays
        h = held + x
        tl.store(Dc + sums * states + n, tl.sum(tl.sum(g * h, axis=2), axis=1), mask=time < steps)
        reads = g * c[:, None, None]
        reads = tl.where(end, reads + after, reads)
        next_decay = tl.where(next_fresh, 0.0, tl.exp(next_delta * rate[None, :]))
        _, d = tl.associative_scan((next_decay[:, None, :] + tl.zeros_like(u), reads), 0, then, reverse=True)
        of_state = tl.sum(d * held, axis=1)
        ddelta += of_state * rate[None, :]
        tl.store(Drates + (part * states + n) * BLOCK + tl.arange(0, BLOCK), tl.sum(of_state * delta, axis=0))
        du += d * b[:, None, None]
        written = tl.sum(d * u, axis=1) * delta
        tl.store(Db + sums * states + n, tl.sum(written, axis=1), mask=time < steps)
    ddelta += tl.sum(du * u, axis=1)
    tl.store(Ddelta + of_steps, ddelta, mask=real)
    du *= delta[:, None, :]
    if Skip is not None:
        du += g * tl.load(Skip + channels, mask=inside, other=0.0)[None, None, :]
        tl.store(Dskip + part * BLOCK + tl.arange(0, BLOCK), tl.sum(tl.sum(g * u, axis=1), axis=0))
    given = real[:, None, :] & (lanes < SIGNALS)[None, :, None]
    to = (
        time[:, None, None] * du_t
        + lanes[None, :, None] * du_s
        + (row * du_b + head * du_h + column)[None, None, :]
    )
    tl.store(Du + to, du, mask=given)


def _states(
    x: Tensor, delta: Tensor, rates: Tensor, b: Tensor, reset: Tensor | None, y: Tensor, mass: Tensor, first: Tensor,
    normalize: bool, backward: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states before the chunks and after the last, or their gradients after the chunks and before the first."""
    (batch, steps, width), signals, states = delta.shape, x.shape[2], rates.shape[1]
    blocks, chunks, lanes = -(-width // BLOCK), -(-steps // KEPT), signals + normalize
    kept, final = delta.new_empty((batch * blocks, chunks, states * lanes * BLOCK)), torch.empty_like(first)
    options = {"BACKWARD": backward, "STEPS": KEPT, "BLOCK": BLOCK}
    launch(
        _add, (batch, chunks, blocks), x, delta, rates, b, reset, y, mass, kept, steps, width, states, x.shape[4],
        *x.stride()[:4], *y.stride()[:4],
        SIGNALS=signals, NORMALIZE=normalize, LANES=power_of_2(lanes), num_warps=WARPS, **options,
    )  # fmt: skip
    launch(
        _carry, (batch, blocks, -(-states * lanes * BLOCK // NUMBERS)), kept, first, final, delta, rates, reset,
        steps, chunks, width, states, lanes, NUMBERS=NUMBERS, num_warps=2, **options,
    )  # fmt: skip
    return kept, final


def _contiguous(*xs: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in xs]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, reset: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u = with_whole_rows(u)
    delta, rates, b, c, skip, first, fresh = _contiguous(delta, A, B, C, D, state, reset)
    (batch, steps, width), signals = delta.shape, u.shape[2]
    y = _signals(u, delta.dtype)
    mass = delta.new_empty((batch, steps if normalize else 0, width))
    kept, last = _states(u, delta, rates, b, fresh, y, mass, first, normalize, False)
    launch(
        _read, (batch, kept.shape[1], -(-width // BLOCK)), u, delta, rates, b, c, skip, fresh, kept, y, mass,
        steps, width, rates.shape[1], u.shape[4], *u.stride()[:4], *y.stride()[:4], SIGNALS=signals,
        NORMALIZE=normalize, LANES=power_of_2(signals + normalize), STEPS=KEPT, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y, last, kept, mass


def selective_scan_backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor, reset: Tensor | None, y: Tensor, kept: Tensor, mass: Tensor, normalize: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dy, u, y = with_whole_rows(dy), with_whole_rows(u), with_whole_rows(y)
    delta, rates, b, c, skip, fresh = _contiguous(delta, A, B, C, D, reset)
    (batch, steps, width), signals, states = delta.shape, u.shape[2], rates.shape[1]
    after = torch.zeros_like(state) if dlast is None else dlast.contiguous()
    dkept, dstate = _states(dy, delta, rates, c, fresh, y, mass, after, normalize, True)
    blocks, chunks = -(-width // BLOCK), kept.shape[1]
    du, ddelta = _signals(u, u.dtype), torch.empty_like(delta)
    drates = delta.new_empty((batch, blocks, chunks, states, BLOCK))
    db, dc = (delta.new_empty((blocks, batch, steps, states)) for _ in range(2))
    dskip = None if skip is None else delta.new_empty((batch, blocks, chunks, BLOCK))
    launch(
        _back, (batch, chunks, blocks), u, delta, rates, b, c, skip, fresh, kept, dkept, dy, y, mass,
        du, ddelta, drates, db, dc, dskip, steps, width, states, u.shape[4],
        *u.stride()[:4], *dy.stride()[:4], *y.stride()[:4], *du.stride()[:4], SIGNALS=signals,
        NORMALIZE=normalize, LANES=power_of_2(signals + normalize), STEPS=KEPT, BLOCK=BLOCK, num_warps=WARPS_BACK,
    )  # fmt: skip
    dA = drates.sum((0, 2)).transpose(1, 2).reshape(-1, states)[:width].contiguous()
    dD = delta.new_empty(0) if dskip is None else dskip.sum((0, 2)).flatten()[:width].contiguous()
    return du, ddelta, dA, db.sum(0), dc.sum(0), dD, dstate


def _call(new: Any, dtype: torch.dtype, signals: int, normalize: bool, packed: bool) -> tuple[Any, ...]:
    u, delta, state = (
        new(2, 64, signals, 3, 32, dtype=dtype),
        new(2, 64, 96),
        new(2, signals + normalize, 96, 16),
    )
    reset = new(2, 64, dtype=torch.bool) if packed else None
    return u, delta, new(96, 16), new(2, 64, 16), new(2, 64, 16), new(96), state, reset, normalize


def _backward_call(new: Any, *sort: Any) -> tuple[Any, ...]:
    *inputs, normalize = _call(new, *sort)
    mass = new(2, 64 if normalize else 0, 96)
    y = new(2, 64, sort[1], 3, 32)
    return y, None, *inputs, y, new(12, 2, 16 * (sort[1] + normalize) * BLOCK), mass, normalize


_SORTS = {
    "bf16 2 signals normalized": (torch.bfloat16, 2, True, False),
    "bf16 2 signals normalized packed": (torch.bfloat16, 2, True, True),
    "fp16 1 signal": (torch.float16, 1, False, False),
    "fp32 1 signal normalized packed": (torch.float32, 1, True, True),
}
CALLS: dict[str, tuple[str, Any]] = {}
for _label, _sort in _SORTS.items():
    CALLS[_label] = ("selective_scan", lambda new, s=_sort: _call(new, *s))
    CALLS[_label + " backward"] = ("selective_scan_backward", lambda new, s=_sort: _backward_call(new, *s))
