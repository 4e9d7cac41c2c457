"""`first_order_scan` against its float64 loop, and what a recurrence must keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import reference
from helmholtz.ops.scan import first_order_scan, leaky_scan
from helpers import assert_matches, grads
from recurrence import Recurrence, RecurrenceTests

BUDGET = 2.2  # worst measured: 0.73 eps (relative RMS over outputs, states and gradients)


def _call(scan):
    def call(inputs, state, reset):
        return scan(*inputs, state=None if state is None else state[0], reset=reset)

    return call


def _make(batch, time):
    decay = torch.rand(batch, time, 5)
    decay[:, time // 3 :: 7] = 0.0  # forgets at once
    decay[:, time // 2 :: 9] = 1.0  # keeps everything
    return [decay, torch.randn(batch, time, 5)]


PROBLEM = Recurrence(
    op=_call(first_order_scan),
    oracle=_call(reference.first_order_scan),
    make=_make,
    make_state=lambda batch: [torch.randn(batch, 5)],
    time=(1, 1),
    out_time=1,
)


LEAKY = Recurrence(
    op=_call(leaky_scan),
    oracle=_call(reference.leaky_scan),
    make=lambda batch, time: [torch.randn(batch, time, 5), torch.randn(batch, time, 5)],
    make_state=lambda batch: [torch.randn(batch, 5)],
    time=(1, 1),
    out_time=1,
)


class TestRecurrence(RecurrenceTests):
    problems = {"scan": PROBLEM}
    budget = BUDGET


class TestLeakyRecurrence(RecurrenceTests):
    problems = {"leaky": LEAKY}
    budget = 8  # a sigmoid near 1 has a derivative that cancels


@pytest.mark.parametrize("time", [2, 65, 4200])
def test_masked_steps_leave_the_state_as_it_was(time):
    """Also through three levels of chunks, and with decays that never and always forget."""
    rate, x, state = 3 * torch.randn(2, time, 3), torch.randn(2, time, 3), torch.randn(2, 3)
    rate[0, :, 0], rate[1, :, 0] = -40, 100
    mask, reset = torch.rand(2, time) < 0.7, torch.rand(2, time) < 0.01
    leaves = [y.requires_grad_() for y in (rate, x, state)]
    cotangents = [torch.randn(2, time, 3).double(), torch.randn(2, 3).double()]

    def both(scan):
        return lambda rate, x, state: scan(rate, x, state=state, mask=mask, reset=reset)

    actual, expected = both(leaky_scan), both(reference.leaky_scan)
    for a, e in zip(actual(*leaves), expected(*leaves), strict=True):
        assert_matches("h, last", a, e, budget=8)
    for a, e in zip(grads(actual, leaves, cotangents), grads(expected, leaves, cotangents), strict=True):
        assert_matches("gradients", a, e, budget=8)


@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 700),
    width=st.sampled_from([1, 16, 1500]),
    strength=st.sampled_from([1e-30, 0.01, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_length_and_width(batch, time, width, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(batch, time, width, generator=generator).pow_(0.01).mul_(strength)
    x = torch.rand(batch, time, width, generator=generator)  # of one sign: no cancellation in a row of one
    for name, a, e in zip(
        "hl", first_order_scan(decay, x), reference.first_order_scan(decay, x), strict=True
    ):
        assert_matches(name, a, e, budget=3.6)  # worst measured: 1.2 eps


def test_long_memory_is_exact():
    """Decays that a cumulative product would lose to underflow after a few steps, and ones that never forget."""
    decay, x = torch.full((1, 4096, 4), 0.5), torch.zeros(1, 4096, 4)
    decay[..., 1], decay[..., 2], decay[..., 3] = 1.0, 1e-20, 0.0
    x[:, 0] = 1.0
    x[:, 4000] = 3.0
    h, _ = first_order_scan(decay, x)
    assert torch.equal(h[0, 4001], torch.tensor([1.5, 4.0, 3e-20, 0.0]))
    assert torch.equal(h[0, 100, :2], torch.tensor([0.5**100, 1.0]))
