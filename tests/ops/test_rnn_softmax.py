"""`rnn_softmax` against its float64 loop, and the keys that break a careless softmax."""

from dataclasses import replace

import pytest
import torch

from helmholtz import reference
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helpers import assert_matches
from recurrence import Recurrence, RecurrenceTests, check_gradients_numerically

BUDGET = 10.0  # worst measured: 3.3 eps (relative RMS over outputs, states and gradients)


def _op(inputs, state, reset):
    out, last = rnn_softmax(*inputs, state=None if state is None else RNNSoftmaxState(*state), reset=reset)
    return out, last.max, last.sums


def _oracle(inputs, state, reset):
    out, last = reference.rnn_softmax(*inputs, state=None if state is None else tuple(state), reset=reset)
    return out, *last


PROBLEM = Recurrence(
    op=_op,
    oracle=_oracle,
    make=lambda batch, time: [3 * torch.randn(batch, time, 5), torch.randn(batch, time, 3, 5)],
    make_state=lambda batch: [torch.randn(batch, 5), torch.rand(batch, 4, 5) + 1],
    time=(1, 1),
    out_time=1,
    free=1,
)


class TestRecurrence(RecurrenceTests):
    problems = {"rnn_softmax": PROBLEM}
    budget = BUDGET

    def test_gradcheck(self):
        """The sums have a meaning, hence a numerical derivative, only in absolute units."""

        def absolute(inputs, state, reset):
            out, top, sums = _op(inputs, state, reset)
            return out, top, sums * top.exp().unsqueeze(1)

        check_gradients_numerically(replace(PROBLEM, op=absolute))


@pytest.mark.parametrize("slope", [20.0, -20.0, 1e4, -1e4])
def test_keys_that_rise_or_fall_without_end(slope):
    k = slope * torch.arange(300.0).view(1, -1, 1).expand(1, 300, 2)
    signals = torch.randn(1, 300, 2, 2)
    averaged, state = rnn_softmax(k, signals)
    expected, (top, sums) = reference.rnn_softmax(k, signals)
    assert_matches("averaged", averaged, expected, budget=BUDGET)
    assert_matches("sums", state.sums, sums, budget=BUDGET)
    assert torch.equal(state.max.double(), top)


def test_weights_are_a_causal_distribution():
    k = 10 * torch.randn(1, 40, 3)
    one_hot = torch.eye(40).view(1, 40, 40, 1).expand(1, 40, 40, 3)
    weights, _ = rnn_softmax(k, one_hot)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 40, 3))
    assert not weights.movedim(-1, 1).triu(1).any()
    want = (
        k.movedim(1, -1)
        .unsqueeze(2)
        .expand(1, 3, 40, 40)
        .masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    )
    torch.testing.assert_close(weights.movedim(-1, 1), want.softmax(-1))


def test_a_huge_future_key_is_invisible():
    k, signals = torch.randn(1, 20, 4), torch.randn(1, 20, 2, 4)
    louder = k.clone()
    louder[:, 12] = 1e30
    assert torch.equal(rnn_softmax(k, signals)[0][:, :12], rnn_softmax(louder, signals)[0][:, :12])


def test_shifting_all_keys_changes_nothing():
    k, signals = torch.randn(1, 50, 4).mul(8).round(), torch.randn(1, 50, 2, 4)
    assert torch.equal(rnn_softmax(k, signals)[0], rnn_softmax(k + 4096, signals)[0])


def test_pads_have_no_weight():
    """Keys of ``-inf`` in front, between and behind: as if the steps were not there, and nothing before the first."""
    real = torch.tensor([False, False, True, False, True, True, False]).repeat(1, 1)
    k, signals = torch.randn(1, 7, 3), torch.randn(1, 7, 2, 3)
    padded = k.masked_fill(~real.unsqueeze(-1), -torch.inf).requires_grad_()
    signals.requires_grad_()
    averaged, state = rnn_softmax(padded, signals)
    alone, last = rnn_softmax(k[real].unsqueeze(0), signals[real].unsqueeze(0))
    assert_matches("real steps", averaged[real], alone[0], budget=BUDGET)
    assert_matches("last", state.sums, last.sums, budget=BUDGET)
    assert not averaged[:, :2].any()
    dk, dx = torch.autograd.grad(averaged.square().sum(), (padded, signals))
    assert dk.isfinite().all() and dx.isfinite().all()
    assert not dk[~real].any() and not dx[~real].any()
    assert dx[real].all()


def test_a_reset_at_a_pad_forgets():
    k, signals = torch.randn(1, 5, 3), torch.randn(1, 5, 2, 3)
    k[:, 2] = -torch.inf
    reset = torch.tensor([[False, False, True, False, False]])
    averaged, _ = rnn_softmax(k, signals, reset=reset)
    alone, _ = rnn_softmax(k[:, 3:], signals[:, 3:])
    assert not averaged[:, 2].any()
    assert_matches("after it", averaged[:, 3:], alone, budget=BUDGET)


def test_all_pads():
    k, signals = torch.full((2, 5, 3), -torch.inf, requires_grad=True), torch.randn(2, 5, 2, 3)
    averaged, state = rnn_softmax(k, signals)
    assert not averaged.any() and not state.sums.any() and (state.max == -torch.inf).all()
    (dk,) = torch.autograd.grad(averaged.sum(), k)
    assert not dk.any()
    later, _ = rnn_softmax(torch.zeros(2, 1, 3), signals[:, :1], state=state)
    assert torch.equal(later, signals[:, :1])


def test_states_merge():
    """The state of a span is ``(m, S)`` up to ``S e^m``: merging two spans by hand gives that of both."""
    k, signals = 5 * torch.randn(1, 30, 3), torch.randn(1, 30, 2, 3)
    a, b, both = (rnn_softmax(k[:, i:j], signals[:, i:j])[1] for i, j in ((0, 11), (11, 30), (0, 30)))
    top = torch.maximum(a.max, b.max)
    merged = a.sums * (a.max - top).exp().unsqueeze(1) + b.sums * (b.max - top).exp().unsqueeze(1)
    assert torch.equal(both.max, top)
    assert_matches("sums", both.sums, merged, budget=BUDGET)
