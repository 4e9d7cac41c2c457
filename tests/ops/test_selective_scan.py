"""`selective_scan` against its float64 loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import reference
from helmholtz.ops.selective_scan import selective_average, selective_scan
from helpers import DTYPES, SHAPES, assert_matches
from recurrence import (
    Recurrence,
    RecurrenceTests,
    check_causality,
    check_plain,
    check_reference,
    check_splits,
)

BUDGET = 7.0  # worst measured: 2.4 eps (relative RMS over outputs, states and gradients)


def _call(scan):
    def call(inputs, state, reset):
        return scan(*inputs, state=None if state is None else state[0], reset=reset)

    return call


def _make(batch, time, signals=3, channels=5, states=4):
    delta = torch.rand(batch, time, channels)
    delta[:, time // 3 :: 5] = 0.0  # pads
    u, B, C = torch.randn(batch, time, signals, channels), *torch.randn(2, batch, time, states)
    return [u, delta, -torch.rand(channels, states), B, C, torch.randn(channels)]


PROBLEM = Recurrence(
    op=_call(selective_scan),
    oracle=_call(reference.selective_scan),
    make=_make,
    make_state=lambda batch: [torch.randn(batch, 3, 5, 4)],
    time=(1, 1, None, 1, 1, None),
    out_time=1,
)


def _make_average(batch, time, signals=2, heads=3, width=7, states=4):
    """Channels of more than a block of the kernel's, which heads do not fill, in the layout of a mixer."""
    channels = heads * width
    delta, D = torch.rand(batch, time, channels), torch.rand(channels) + 0.1
    u = torch.randn(batch, time, heads, signals, width).transpose(2, 3)
    return [u, delta, -torch.rand(channels, states), *torch.rand(2, batch, time, states), D]


def _average(u, *rest, **options):
    y, last = selective_average(u, *rest, **options)
    return y.to(u.dtype), last


AVERAGE = Recurrence(
    op=_call(_average),
    oracle=_call(reference.selective_average),
    make=_make_average,
    make_state=lambda batch: [torch.rand(batch, 3, 21, 4)],
    time=(1, 1, None, 1, 1, None),
    out_time=1,
)


class TestRecurrence(RecurrenceTests):
    problems = {"scan": PROBLEM}
    budget = BUDGET


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize(
    "shape", SHAPES[1:]
)  # the average of one token alone is that token: its gradients are 0
def test_averages_are_the_scan_over_that_of_ones(shape, with_reset, dtype):
    check_reference(AVERAGE, shape, dtype, with_reset, budget=BUDGET)


def test_averages_of_a_stream_equal_those_of_one_call():
    check_splits(AVERAGE, budget=BUDGET)
    check_causality(AVERAGE)
    check_plain(AVERAGE)


@given(
    signals=st.integers(1, 3), channels=st.integers(1, 6), states=st.integers(1, 6), time=st.integers(1, 70)
)
def test_any_widths(signals, channels, states, time):
    """Equal widths included: nothing depends on channels and states differing."""
    inputs = _make(2, time, signals, channels, states)
    for name, a, e in zip("yh", selective_scan(*inputs), reference.selective_scan(*inputs), strict=True):
        assert_matches(name, a, e, budget=BUDGET)


def test_a_zero_step_passes_the_state_through():
    u, delta, A, B, C, D = _make(2, 9)
    state = torch.randn(2, 3, 5, 4)
    y, last = selective_scan(u, torch.zeros_like(delta), A, B, C, D, state=state)
    assert torch.equal(last, state)
    assert_matches("y", y, torch.einsum("bscn,btn->btsc", state, C) + D * u, budget=BUDGET)


def test_strong_decay_forgets():
    u, delta, A, B, C, _ = _make(1, 40)
    y, last = selective_scan(u, delta + 1, 1e4 * (A - 1), B, C, state=torch.randn(1, 3, 5, 4))
    input_now = torch.einsum("btc,btn,btsc->btscn", delta + 1, B, u)
    assert_matches("last", last, input_now[:, -1], budget=BUDGET)
    assert_matches("y", y, torch.einsum("btscn,btn->btsc", input_now, C), budget=BUDGET)


def test_signals_share_the_dynamics():
    """Each signal alone gives what it gives among the others, and the scan is linear in them."""
    u, *rest = _make(2, 33)
    together, _ = selective_scan(u, *rest)
    for s in range(3):
        assert_matches(
            f"signal {s}", together[:, :, s : s + 1], selective_scan(u[:, :, s : s + 1], *rest)[0], budget=4
        )
    assert_matches("linear", selective_scan(-2 * u, *rest)[0], -2 * together, budget=BUDGET)
