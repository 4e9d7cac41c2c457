"""`causal_conv` against its float64 loop: state, pads, packed sequences."""

from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import reference
from helmholtz.ops import causal_conv
from helpers import assert_matches, grads
from recurrence import Recurrence, RecurrenceTests, check_reset_isolates, check_splits, random_reset

BUDGET = 10.0  # worst measured: 3.9 eps (relative RMS over outputs, states and gradients)
CHANNELS, WIDTH = 5, 4


def _mask(batch, time):
    """Every pattern of pads: before, between and after real tokens, the same in each call of a length."""
    return torch.rand(batch, time, generator=torch.Generator().manual_seed(time)) > 0.4


def _call(conv, *, padded=False):
    def call(inputs, state, reset):
        mask = _mask(*inputs[0].shape[:2]) if padded else None
        return conv(*inputs, state=None if state is None else state[0], mask=mask, reset=reset)

    return call


def _make(batch, time):
    return [torch.randn(batch, time, CHANNELS), torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)]


def _silu(*inputs, **options):
    y, last = reference.causal_conv(*inputs, **options)
    return F.silu(y), last


PROBLEMS = {
    name: Recurrence(
        op=_call(partial(causal_conv, activation="silu") if silu else causal_conv, padded=padded),
        oracle=_call(_silu if silu else reference.causal_conv, padded=padded),
        make=_make,
        make_state=lambda batch: [torch.randn(batch, WIDTH - 1, CHANNELS)],
        time=(1, None, None),
        out_time=1,
    )
    for name, (padded, silu) in {
        "whole": (False, False),
        "padded": (True, False),
        "with SiLU": (False, True),
        "padded, with SiLU": (True, True),
    }.items()
}


class TestRecurrence(RecurrenceTests):
    problems = PROBLEMS
    budget = BUDGET

    def test_split_anywhere_equals_one_call(self):
        check_splits(PROBLEMS["whole"], budget=BUDGET)

    def test_reset_isolates(self):
        check_reset_isolates(PROBLEMS["whole"])


def test_the_past_of_a_token_is_its_window():
    """One input reaches the outputs of the next WIDTH - 1 tokens, none before and none after."""
    x, weight, _ = _make(1, 12)
    x.requires_grad_()
    y, _ = causal_conv(x, weight)
    for t in range(12):
        (g,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert g[0].any(dim=-1).nonzero().flatten().tolist() == list(range(max(0, t - WIDTH + 1), t + 1))


def test_equals_the_convolution_of_torch():
    x, weight, bias = _make(3, 50)
    want = F.conv1d(
        F.pad(x.mT.double(), (WIDTH - 1, 0)), weight.double().unsqueeze(1), bias.double(), groups=CHANNELS
    )
    assert_matches("y", causal_conv(x, weight, bias)[0], want.mT, budget=BUDGET)


@given(time=st.integers(1, 12), width=st.integers(1, 6), channels=st.integers(1, 3), data=st.data())
def test_any_pattern_of_pads_and_starts(time, width, channels, data):
    """Also restarts at pads, windows longer than the sequence and rows without a real token."""
    flags = st.lists(st.booleans(), min_size=2 * time, max_size=2 * time)
    mask, reset = (torch.tensor(data.draw(flags)).view(2, time) for _ in range(2))
    x, weight = torch.randn(2, time, channels), torch.randn(channels, width)
    state = torch.randn(2, width - 1, channels)
    expected = reference.causal_conv(x, weight, state=state, mask=mask, reset=reset)
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    actual = causal_conv(dirty, weight, state=state, mask=mask, reset=reset)
    for name, a, e in zip(("y", "state"), actual, expected, strict=True):
        assert_matches(name, a, e, budget=BUDGET)


def test_pads_change_no_bit_and_have_no_gradient():
    x, weight, bias = _make(2, 40)
    mask = _mask(2, 40)
    leaf = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    y, last = causal_conv(leaf, weight.requires_grad_(), bias, mask=mask)
    for row in range(2):
        alone, state = causal_conv(x[row : row + 1, mask[row]], weight, bias)
        assert torch.equal(y[row, mask[row]], alone[0]) and torch.equal(last[row], state[0])
    assert not y[~mask].any()
    for g in torch.autograd.grad(y.square().sum(), (leaf, weight)):
        assert g.isfinite().all()
        assert g.shape != leaf.shape or not g[~mask].any()


def test_a_masked_stream_equals_one_call():
    (x, weight, bias), mask, reset = _make(2, 37), _mask(2, 37), random_reset(2, 37)
    whole, last = causal_conv(x, weight, bias, mask=mask, reset=reset)
    for step in (1, 2, 5):
        state, parts = None, []
        for i in range(0, 37, step):
            t = slice(i, i + step)
            y, state = causal_conv(x[:, t], weight, bias, state=state, mask=mask[:, t], reset=reset[:, t])
            parts.append(y)
        assert_matches("y", torch.cat(parts, dim=1), whole, budget=BUDGET)
        assert torch.equal(state, last)


def test_a_part_of_a_projection_wider_than_a_block():
    """A slice of joint rows in bf16 under float32 filters, of more channels than the kernel takes at once."""
    joint = torch.randn(2, 9, 400).bfloat16()
    x, (weight, bias) = joint[..., 30:330], (torch.randn(300, 3), torch.randn(300))
    state, (mask, reset) = torch.randn(2, 2, 300), torch.rand(2, 2, 9) > 0.4

    def call(conv, x, *rest):
        return conv(x, *rest[:2], state=rest[2], mask=mask, reset=reset)

    fast, exact = (
        partial(call, partial(causal_conv, activation="silu")),
        partial(call, _silu),
    )
    wide = [z.double() for z in (x, weight, bias, state)]
    y, last = fast(x, weight, bias, state)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    cotangents = [torch.randn(2, 9, 300).bfloat16().double(), torch.randn(2, 2, 300).double()]
    for name, a, e in zip(("y", "last"), (y, last), exact(*wide), strict=True):
        assert_matches(name, a, e, budget=BUDGET)
    want = grads(exact, wide, cotangents)
    for a, e in zip(grads(fast, [x, weight, bias, state], cotangents), want, strict=True):
        assert_matches("gradient", a, e, budget=BUDGET)
