"""The first-order scan ``h_t = a_t h_{t-1} + x_t``, with ``a_t = sigmoid(-r_t)`` of logits.

Steps compose: ``(a, x)`` then ``(a', x')`` is ``(a a', a' x + x')``. A program takes a block of channels and goes
through time in tiles, each scanned in parallel, what is before the tile being part of its first step. Where rows and
channels are few, time is cut into spans: a first pass finds what each does to any state, a scan of the spans what
stands before each, and the last pass all states. Backward is the same recurrence from the end, with the decays one step
later,

    d_t = dh_t + a_{t+1} d_{t+1},  d_T = dlast,  a_T = 1:  dx = d,  da_t = d_t h_{t-1},  dstate = d_{-1}.

Floor: 3 numbers to and from memory per step and channel forward, 5 backward; spans read 2 of them twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.ops.triton._shared import launch, sigmoid, with_whole_rows

STEPS, BLOCK, WARPS = 32, 32, 4
"""Of a tile: steps, channels, and warps that work on it."""
PROGRAMS, LEAST = 512, 256
"""Programs that fill a GPU, and steps of a span below which another pass costs more than it gives."""


@triton.jit
def then(decay, x, next_decay, next_x):
    """Two steps of a first-order recurrence as one."""
    return decay * next_decay, next_decay * x + next_x


@triton.jit
def row_of(tile, which):
    """A row of a tile, chosen by the one True of ``which``: rows x 1."""
    return tl.sum(tl.where(which, tile, 0.0), axis=0)


@triton.jit
def _scan(
    Rate, X, Start, Y, Last, Through, H, State, Drate, steps, width, span, rate_b, rate_t, x_b, x_t,
    LOGITS: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Any of Y, Through (the product of a span's decays) and Drate may be None; H and State belong to Drate."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < width
    of_span = (row * tl.num_programs(2) + part) * width + channels
    h = tl.zeros([BLOCK], tl.float32)
    if Start is not None:
        h = tl.load(Start + of_span, mask=inside, other=0.0)
    product = tl.full([BLOCK], 1.0, tl.float32)
    total = steps + REVERSE
    for first in range(part * span, tl.minimum(total, part * span + span), STEPS):
        place = first + tl.arange(0, STEPS)
        if REVERSE:
            rate_time, time = steps - place, steps - 1 - place
        else:
            rate_time, time = place, place
        of_rate = ((rate_time >= 0) & (rate_time < steps))[:, None] & inside[None, :]
        of_x = ((time >= 0) & (time < steps))[:, None] & inside[None, :]
        rate_at = row * rate_b + rate_time.to(tl.int64)[:, None] * rate_t + channels[None, :]
        decay = tl.load(Rate + rate_at, mask=of_rate, other=float("-inf") if LOGITS else 1.0).to(tl.float32)
        if LOGITS:
            decay = sigmoid(-decay)
        x_at = row * x_b + time.to(tl.int64)[:, None] * x_t + channels[None, :]
        x = tl.load(X + x_at, mask=of_x, other=0.0).to(tl.float32)
        x = tl.where((place == first)[:, None], decay * h[None, :] + x, x)
        through, y = tl.associative_scan((decay, x), 0, then)
        final = (place == tl.minimum(first + STEPS, total) - 1)[:, None]
        h = row_of(y, final)
        to = (row * steps + time.to(tl.int64)[:, None]) * width + channels[None, :]
        if Through is not None:
            product *= row_of(through, final)
        if Y is not None:
            tl.store(Y + to, y, mask=of_x)
        if Drate is not None:
            before = tl.load(H + to - width, mask=of_x & (time > 0)[:, None], other=0.0)
            if State is not None:
                state = tl.load(State + row * width + channels, mask=inside, other=0.0)
                before = tl.where((time == 0)[:, None], state[None, :], before)
            drate = y * before
            if LOGITS:
                own_at = row * rate_b + time.to(tl.int64)[:, None] * rate_t + channels[None, :]
                own = tl.load(Rate + own_at, mask=of_x, other=0.0).to(tl.float32)
                drate *= -sigmoid(-own) * sigmoid(own)  # not 1 - sigmoid(-own), which cancels
            tl.store(Drate + to, drate, mask=of_x)
    tl.store(Last + of_span, h, mask=inside)
    if Through is not None:
        tl.store(Through + of_span, product, mask=inside)


def spans_of(programs: int, steps: int, tile: int) -> tuple[int, int]:
    """How many spans time is cut into where there are so few programs, and their length, a number of tiles."""
    count = max(1, min(PROGRAMS // max(1, programs), steps // LEAST))
    length = -(-steps // count)
    length += -length % tile
    return -(-steps // length), length


def _run(
    rate: Tensor, x: Tensor, start: Tensor, y: Tensor, logits: bool, reverse: bool, *others: Tensor | None
) -> Tensor:
    """Fills in ``y`` and what else is given, ``h, state, drate``; returns what stands after the last step."""
    batch, steps, width = x.shape
    blocks = -(-width // BLOCK)
    count, length = spans_of(batch * blocks, steps + reverse, STEPS)
    sizes = steps, width, length, *rate.stride()[:2], *x.stride()[:2]
    options = {"LOGITS": logits, "REVERSE": reverse, "STEPS": STEPS, "BLOCK": BLOCK, "num_warps": WARPS}
    last, grid = start.new_empty((batch, count, width)), (batch, blocks, count)
    starts = start
    if count > 1:
        through = torch.empty_like(last)
        launch(_scan, grid, rate, x, None, None, last, through, None, None, None, *sizes, **options)
        states = torch.empty_like(last)
        _run(through, last, start, states, False, False, None, None, None)
        starts = torch.cat([start.unsqueeze(1), states[:, :-1]], 1)
    launch(_scan, grid, rate, x, starts, y, last, None, *others, *sizes, **options)
    return last[:, -1].contiguous()


def scan(decay: Tensor, x: Tensor, state: Tensor, logits: bool) -> tuple[Tensor, Tensor]:
    h = state.new_empty(x.shape)
    rate, x = with_whole_rows(decay), with_whole_rows(x)
    return h, _run(rate, x, state.contiguous(), h, logits, False, None, None, None)


def scan_backward(
    dh: Tensor, dlast: Tensor | None, decay: Tensor, h: Tensor, state: Tensor, logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rate, dh = with_whole_rows(decay), with_whole_rows(dh)
    ddecay, dx = (decay.new_empty(decay.shape) for _ in range(2))
    start = torch.zeros_like(state) if dlast is None else dlast.contiguous()
    dstate = _run(rate, dh, start, dx, logits, True, h.contiguous(), state.contiguous(), ddecay)
    return ddecay, dx, dstate


def _call(new: Any, dtype: torch.dtype, logits: bool) -> tuple[Any, ...]:
    return new(2, 64, 96, dtype=dtype), new(2, 64, 96, dtype=dtype), new(2, 96), logits


def _backward_call(new: Any, dtype: torch.dtype, logits: bool, steps: int = 64) -> tuple[Any, ...]:
    h = new(2, steps, 96)
    return h, None, new(2, steps, 96, dtype=dtype), h, new(2, 96), logits


CALLS: dict[str, tuple[str, Any]] = {
    "bf16 logits": ("scan", lambda new: _call(new, torch.bfloat16, True)),
    "fp32": ("scan", lambda new: _call(new, torch.float32, False)),
    "fp32 logits in spans": ("scan", lambda new: (new(1, 2048, 96), new(1, 2048, 96), new(1, 96), True)),
    "bf16 logits backward": ("scan_backward", lambda new: _backward_call(new, torch.bfloat16, True)),
    "fp32 backward": ("scan_backward", lambda new: _backward_call(new, torch.float32, False)),
    "fp32 logits in spans backward": (
        "scan_backward",
        lambda new: _backward_call(new, torch.float32, True, 2048),
    ),
}
