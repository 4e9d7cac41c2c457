"""A filter over the last W real tokens of each channel, and SiLU of it if asked for.

Tokens are independent of each other: a program takes a tile of steps by channels and reads the W rows behind it, which
lie in a cache after the first. Without a mask the row w tokens before t is t - w; with one a table of the real tokens
in their order says where it is, and another which place a token has in that order. A token before a start is not seen:
tokens are numbered by sequence. Backward reads, for every token, the W outputs that it went into and what they saw, and
makes their sums again rather than keep them: W^2 rows from a cache against one number more to memory and back.

Floor: 1 number in and 1 out per token and channel forward, 2 in and 1 out backward; 2 W operations and an exponential
forward, 2 W^2 + 4 W and W exponentials backward. Gradients of the filters are summed over a tile, then over tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import launch, power_of_2, sigmoid, with_whole_rows

STEPS, BLOCK, WARPS = 32, 64, 8
"""Of a tile."""


@triton.jit
def _token(Order, place, row, steps, count):
    """Where the real token of a place in the order lies; of no such place, anywhere."""
    inside = (place >= 0) & (place < count)
    if Order is None:
        return place.to(tl.int64)
    else:  # what follows a return is compiled all the same
        return tl.load(Order + row * steps + place, mask=inside, other=0).to(tl.int64)


@triton.jit
def _sequence(Segment, token, real, row, steps):
    """The number of its sequence; 0 is that of the state."""
    if Segment is None:
        return tl.zeros_like(token).to(tl.int32)
    else:  # what follows a return is compiled all the same
        return tl.load(Segment + row * steps + token, mask=real, other=0)


@triton.jit
def _tokens(
    X, State, Order, Segment, place, segment, wanted, row, channels, steps, count, past, width, x_b, x_t
):
    """The tokens of places in the order, those below 0 from the state: places x channels, 0 if of another sequence."""
    token, real = _token(Order, place, row, steps, count), (place >= 0) & (place < count)
    seen = wanted & (_sequence(Segment, token, real, row, steps) == segment)
    inside = (channels < width)[None, :]
    x = tl.load(
        X + row * x_b + token[:, None] * x_t + channels[None, :],
        mask=(seen & real)[:, None] & inside,
        other=0.0,
    )
    old = seen & (place < 0) & (place >= -past)
    at = (row * past + past + place.to(tl.int64))[:, None] * width + channels[None, :]
    return x.to(tl.float32) + tl.load(State + at, mask=old[:, None] & inside, other=0.0)


@triton.jit
def _sums(
    X, State, Weight, Bias, Order, Segment, place, segment, wanted, row, channels, steps, count, width, x_b, x_t,
    TAPS: tl.constexpr,
):  # fmt: skip
    """The filter at places in the order."""
    sums = tl.load(Bias + channels, mask=channels < width, other=0.0)[None, :] + tl.zeros_like(place)[:, None]
    for w in range(TAPS):
        seen = _tokens(
            X, State, Order, Segment, place - w, segment, wanted, row, channels, steps, count, TAPS - 1, width, x_b, x_t
        )  # fmt: skip
        sums += (
            seen * tl.load(Weight + channels * TAPS + TAPS - 1 - w, mask=channels < width, other=0.0)[None, :]
        )
    return sums


@triton.jit
def _count(Count, row, steps):
    """Real tokens of a row."""
    if Count is None:
        return steps
    else:  # what follows a return is compiled all the same
        return tl.load(Count + row)


@triton.jit
def _own_places(Place, time, row, steps):
    """The places of tokens in the order; -1 is none."""
    if Place is None:
        return tl.where(time < steps, time, -1)
    else:  # what follows a return is compiled all the same
        return tl.load(Place + row * steps + time, mask=time < steps, other=-1)


@triton.jit
def _filter(
    X, State, Weight, Bias, Order, Place, Count, Segment, Y, steps, width, x_b, x_t,
    SILU: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, time = tl.program_id(0).to(tl.int64), tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    count, place = _count(Count, row, steps), _own_places(Place, time, row, steps)
    real = place >= 0
    segment = _sequence(Segment, time.to(tl.int64), time < steps, row, steps)
    y = _sums(
        X,
        State,
        Weight,
        Bias,
        Order,
        Segment,
        place,
        segment,
        real,
        row,
        channels,
        steps,
        count,
        width,
        x_b,
        x_t,
        TAPS,
    )
    if SILU:
        y *= sigmoid(y)
    to = (row * steps + time)[:, None] * width + channels[None, :]
    tl.store(
        Y + to, tl.where(real[:, None], y, 0.0), mask=(time < steps)[:, None] & (channels < width)[None, :]
    )


@triton.jit
def _last(
    X, State, Order, Count, Segment, Last, steps, width, past, x_b, x_t,
    PAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state after all tokens: the last W - 1 real ones of the sequence that is open at the end."""
    row, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count, at = _count(Count, row, steps), tl.arange(0, PAST)
    final = tl.full([1], 0, tl.int64) + steps - 1
    segment = _sequence(Segment, final, final >= 0, row, steps)
    last = _tokens(
        X, State, Order, Segment, count - past + at, segment, at < past, row, channels, steps, count, past, width,
        x_b, x_t,
    )  # fmt: skip
    to = (row * past + at)[:, None] * width + channels[None, :]
    tl.store(Last + to, last, mask=(at < past)[:, None] & (channels < width)[None, :])


@triton.jit
def _gradients(
    X, State, Weight, Bias, Order, Segment, Dy, place, row, channels, steps, count, width, x_b, x_t, dy_b, dy_t,
    SILU: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Those of the filter's sums at places in the order, and their sequences; 0 at no such place."""
    token, real = _token(Order, place, row, steps, count), (place >= 0) & (place < count)
    segment = _sequence(Segment, token, real, row, steps)
    at = row * dy_b + token[:, None] * dy_t + channels[None, :]
    g = tl.load(Dy + at, mask=real[:, None] & (channels < width)[None, :], other=0.0).to(tl.float32)
    if SILU:
        y = _sums(
            X, State, Weight, Bias, Order, Segment, place, segment, real, row, channels, steps, count, width, x_b, x_t,
            TAPS,
        )  # fmt: skip
        s = sigmoid(y)
        g *= s * (1.0 + y * (1.0 - s))
    return g, segment


@triton.jit
def _back(
    X, State, Weight, Bias, Order, Place, Count, Segment, Dy, Dlast, Dx, Dstate, Dfilters,
    steps, width, x_b, x_t, dy_b, dy_t,
    SILU: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last tile of a row is that of the state before it: W - 1 places below 0."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside, count = (channels < width)[None, :], _count(Count, row, steps)
    of_state = tile == tl.num_programs(1) - 1
    time = tile * STEPS + tl.arange(0, STEPS)
    before = tl.arange(0, STEPS) - (TAPS - 1)
    place = tl.where(of_state, before, _own_places(Place, time, row, steps))
    mine = tl.where(of_state, before < 0, place >= 0)
    segment = _sequence(Segment, time.to(tl.int64), time < tl.where(of_state, 0, steps), row, steps)
    dx = tl.zeros([STEPS, BLOCK], tl.float32)
    for w in range(TAPS):
        g, of_output = _gradients(
            X, State, Weight, Bias, Order, Segment, Dy, place + w, row, channels, steps, count, width,
            x_b, x_t, dy_b, dy_t, SILU, TAPS,
        )  # fmt: skip
        weight = tl.load(Weight + channels * TAPS + TAPS - 1 - w, mask=channels < width, other=0.0)[None, :]
        dx += tl.where((mine & (of_output == segment))[:, None], g, 0.0) * weight
    final = tl.full([1], 0, tl.int64) + steps - 1
    kept = (
        mine & (place >= count - (TAPS - 1)) & (segment == _sequence(Segment, final, final >= 0, row, steps))
    )
    at = (row * (TAPS - 1) + place - count + TAPS - 1)[:, None] * width + channels[None, :]
    if Dlast is not None:
        dx += tl.load(Dlast + at, mask=kept[:, None] & inside, other=0.0)
    if of_state:
        to = (row * (TAPS - 1) + tl.arange(0, STEPS))[:, None] * width + channels[None, :]
        tl.store(Dstate + to, dx, mask=mine[:, None] & inside)
    else:
        to = (row * steps + time)[:, None] * width + channels[None, :]
        tl.store(Dx + to, tl.where(mine[:, None], dx, 0.0), mask=(time < steps)[:, None] & inside)
        g, _ = _gradients(
            X, State, Weight, Bias, Order, Segment, Dy, place, row, channels, steps, count, width,
            x_b, x_t, dy_b, dy_t, SILU, TAPS,
        )  # fmt: skip
        sums = Dfilters + (row * (tl.num_programs(1) - 1) + tile) * (TAPS + 1) * width + channels
        tl.store(sums + TAPS * width, tl.sum(g, axis=0), mask=channels < width)
        for w in range(TAPS):
            seen = _tokens(
                X, State, Order, Segment, place - w, segment, mine, row, channels, steps, count, TAPS - 1, width,
                x_b, x_t,
            )  # fmt: skip
            tl.store(sums + (TAPS - 1 - w) * width, tl.sum(g * seen, axis=0), mask=channels < width)


def _tables(x: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor | None, ...]:
    """Real tokens in their order, the places of all in it, their number, and the number of each token's sequence."""
    segment = None if reset is None else reset.contiguous().cumsum(1, dtype=torch.int32)
    if mask is None:
        return None, None, None, segment
    mask = mask.contiguous()  # tables lie as what they are made of
    order = (~mask).byte().argsort(dim=1, stable=True).int()
    through = mask.cumsum(1, dtype=torch.int32)
    return order, torch.where(mask, through - 1, -1), through[:, -1].contiguous(), segment


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    (batch, steps, width), past = x.shape, state.shape[1]
    y, last = x.new_empty(x.shape), state.new_empty(state.shape)
    x, state, weight, bias = with_whole_rows(x), state.contiguous(), weight.contiguous(), bias.contiguous()
    order, place, count, segment = _tables(x, mask, reset)
    blocks = -(-width // BLOCK)
    launch(
        _filter, (batch, -(-steps // STEPS), blocks), x, state, weight, bias, order, place, count, segment, y,
        steps, width, *x.stride()[:2], SILU=silu, TAPS=past + 1, STEPS=STEPS, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    if past:
        launch(
            _last, (batch, blocks), x, state, order, count, segment, last, steps, width, past, *x.stride()[:2],
            PAST=power_of_2(past), BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return y, last


def causal_conv_backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, mask: Tensor | None,
    reset: Tensor | None, silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, steps, width), taps = x.shape, weight.shape[1]
    dx, dstate = x.new_empty(x.shape), state.new_empty(state.shape)
    dy, x, state, taken, shift = (
        with_whole_rows(dy), with_whole_rows(x), state.contiguous(), weight.contiguous(), bias.contiguous(),
    )  # fmt: skip
    carry = None if dlast is None else dlast.contiguous()
    length = max(STEPS, power_of_2(taps - 1))
    tiles, blocks = -(-steps // length), -(-width // BLOCK)
    parts = weight.new_empty((batch, tiles, taps + 1, width))
    launch(
        _back, (batch, tiles + 1, blocks), x, state, taken, shift, *_tables(x, mask, reset), dy, carry, dx, dstate,
        parts, steps, width, *x.stride()[:2], *dy.stride()[:2],
        SILU=silu, TAPS=taps, STEPS=length, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    sums = parts.sum((0, 1))
    return dx, sums[:taps].t().contiguous(), sums[taps].clone(), dstate


def _call(new: Any, dtype: torch.dtype, silu: bool, packed: bool, taps: int = 4) -> tuple[Any, ...]:
    tables = [new(2, 64, dtype=torch.bool) if packed else None for _ in range(2)]
    return new(2, 64, 96, dtype=dtype), new(96, taps), new(96), new(2, taps - 1, 96), *tables, silu


_SORTS = {
    "bf16 silu": (torch.bfloat16, True, False),
    "bf16 silu packed and padded": (torch.bfloat16, True, True),
    "fp32": (torch.float32, False, False),
    "fp16 8 taps": (torch.float16, True, False, 8),
}
CALLS: dict[str, tuple[str, Any]] = {}
for _label, _sort in _SORTS.items():
    CALLS[_label] = ("causal_conv", lambda new, s=_sort: _call(new, *s))
    CALLS[_label + " backward"] = (
        "causal_conv_backward",
        lambda new, s=_sort: (
            new(2, 64, 96, dtype=s[0]),
            new(2, (s[3:] or (4,))[0] - 1, 96),
            *_call(new, *s),
        ),
    )
