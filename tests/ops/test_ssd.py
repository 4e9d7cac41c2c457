"""`ssd` against its float64 loop, and against the two ops whose special case it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import reference
from helmholtz.ops import linear_attention, selective_scan, ssd
from helpers import assert_matches, grads
from recurrence import Recurrence, RecurrenceTests, random_reset

BUDGET = 16.0  # worst measured: 8.4 eps (relative RMS; the gradient of A, 3 sums of both signs)
HEADS, WIDTH, STATES = 3, 5, 4


def _call(scan, *, strict=False):
    def call(inputs, state, reset):
        return scan(*inputs, state=None if state is None else state[0], reset=reset, strict=strict)

    return call


def _make(batch, time, heads=HEADS, width=WIDTH, states=STATES):
    """Some steps are pads, most decay mildly, a few beyond any memory."""
    delta = torch.rand(batch, time, heads)
    delta[:, time // 3 + 1 :: 5] = 0.0
    delta[:, time // 2 + 1 :: 11, :1] = 1e3
    x, B, C = torch.randn(batch, time, heads, width), *torch.randn(2, batch, time, states)
    x[:, time // 2 + 1 :: 11, :1] *= 1e-3
    return [x, delta, -torch.rand(heads), B, C, torch.randn(heads)]


PROBLEMS = {
    name: Recurrence(
        op=_call(ssd, strict=strict),
        oracle=_call(reference.ssd, strict=strict),
        make=_make,
        make_state=lambda batch: [torch.randn(batch, HEADS, WIDTH, STATES)],
        time=(1, 1, None, 1, 1, None),
        out_time=1,
    )
    for name, strict in {"present": False, "past": True}.items()
}


class TestRecurrence(RecurrenceTests):
    problems = PROBLEMS
    budget = BUDGET


@pytest.mark.parametrize("chunk", [1, 5, 16, 64, 1024])
def test_chunks_do_not_matter(chunk):
    inputs, reset, state = _make(2, 150), random_reset(2, 150), torch.randn(2, HEADS, WIDTH, STATES)

    def run(*xs, chunk=chunk):
        return ssd(*xs[1:], state=xs[0], reset=reset, chunk=chunk)

    leaves = [state, *inputs]
    outputs = run(*leaves, chunk=64)
    for i, (a, e) in enumerate(zip(run(*leaves), outputs, strict=True)):
        assert_matches(f"output {i}", a, e, budget=BUDGET)
    cotangents = [torch.randn_like(x) for x in outputs]
    want = grads(lambda *xs: run(*xs, chunk=64), leaves, cotangents)
    for i, (a, e) in enumerate(zip(grads(run, leaves, cotangents), want, strict=True)):
        assert_matches(f"gradient {i}", a, e, budget=BUDGET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_steps_of_a_stream(dtype, strict):
    """One token after another, from parts of wider tensors, with a gate; activations may be narrower than the state."""
    x, delta, A, B, C, D = _make(2, 7, states=19)
    x, B, C = (torch.cat([z, z], dim=-1).to(dtype)[..., : z.shape[-1]] for z in (x, B, C))
    delta, gate = delta if dtype == torch.bfloat16 else delta.to(dtype), torch.randn_like(x)
    state = start = torch.randn(2, HEADS, WIDTH, 19)
    parts = []
    for t in range(7):
        here = [z[:, t : t + 1] for z in (x, delta, B, C, gate)]
        y, state = ssd(here[0], here[1], A, *here[2:4], D, gate=here[4], state=state, strict=strict)
        parts.append(y)
    want, last = reference.ssd(x, delta, A, B, C, D, state=start, strict=strict)
    wide = gate.double()
    y, want = torch.cat(parts, dim=1), want * wide * wide.sigmoid()
    assert y.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    assert_matches("last", state, last, budget=BUDGET)
    error = (y.double() - want).abs().max() / want.abs().max()
    assert (
        error < (4 if dtype == torch.bfloat16 else BUDGET) * torch.finfo(dtype).eps
    )  # plain forms round thrice


@given(heads=st.integers(1, 4), width=st.integers(1, 6), states=st.integers(1, 6), time=st.integers(1, 140))
def test_any_widths(heads, width, states, time):
    """Equal widths included: nothing depends on heads, widths and states differing."""
    inputs = _make(2, time, heads, width, states)
    for name, a, e in zip("yh", ssd(*inputs), reference.ssd(*inputs), strict=True):
        assert_matches(name, a, e, budget=BUDGET)


def test_equals_the_selective_scan_of_tied_rates():
    x, delta, A, B, C, D = _make(2, 100)
    y, last = ssd(x, delta, A, B, C, D)
    wide = [z.repeat_interleave(WIDTH, dim=-1) for z in (delta, A, D)]
    rates = wide[1].unsqueeze(-1).expand(-1, STATES)
    want, h = selective_scan(x.flatten(2).unsqueeze(2), wide[0], rates, B, C, wide[2])
    assert_matches("y", y.flatten(2), want.squeeze(2), budget=BUDGET)
    assert_matches("last", last.flatten(1, 2), h.squeeze(1), budget=BUDGET)


def test_equals_linear_attention_with_a_decay_per_head():
    x, delta, A, B, C, _ = _make(2, 100)
    y, last = ssd(x, delta, A, B, C)
    q, k = (z.unsqueeze(1).expand(-1, HEADS, -1, -1) for z in (C, B))
    want, h = linear_attention(q, k, (x * delta.unsqueeze(-1)).transpose(1, 2), (delta * A).transpose(1, 2))
    assert_matches("y", y.transpose(1, 2), want, budget=BUDGET)
    assert_matches("last", last.mT, h, budget=BUDGET)


@pytest.mark.parametrize("time", [1, 9])
def test_a_zero_step_passes_the_state_through(time):
    x, delta, A, B, C, D = _make(2, time)
    state = torch.randn(2, HEADS, WIDTH, STATES)
    y, last = ssd(x, torch.zeros_like(delta), A, B, C, D, state=state)
    assert torch.equal(last, state)
    want = torch.einsum("bhpn,btn->bthp", state, C) + D.unsqueeze(-1) * x
    assert_matches("y", y, want, budget=BUDGET)


@pytest.mark.parametrize("rate", [-1e-4, -0.3, -5.0, -100.0, -1e6])
def test_no_decay_overflows_or_blurs(rate):
    """``e^{-delta A T}`` overflows from ``delta A T = -88`` on; this sequence comes to ``rate * 2048``."""
    time = 2048
    x, B = torch.zeros(1, time, 1, 1), torch.ones(1, time, 1)
    x[:, 5] = 1.0
    leaves = [z.requires_grad_() for z in (x, torch.ones(1, time, 1), torch.tensor([rate]), B, B.clone())]
    y, last = ssd(*leaves)
    age = torch.arange(time).double() - 5
    want = torch.where(age >= 0, (rate * age).exp(), 0.0)
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(y[0, :, 0, 0].double(), want, rtol=1e-5, atol=tiny)
    torch.testing.assert_close(last[0, 0, 0].double(), want[-1:], rtol=1e-5, atol=tiny)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), leaves))


def test_weak_decays_are_exact_after_a_strong_one():
    """A difference of sums would know the decays after step 10 to ``1e5 eps = 1e-2`` only."""
    x, delta, A, B, C, _ = _make(1, 60)
    A, delta = -torch.ones(HEADS), 0.01 * torch.rand(1, 60, HEADS)
    delta[:, 10] = 1e5
    x[:, 10] = 0
    y, _ = ssd(x, delta, A, B, C)
    alone, _ = ssd(x[:, 11:], delta[:, 11:], A, B[:, 11:], C[:, 11:])
    assert_matches("y", y[:, 11:], alone, budget=BUDGET)


def test_gradient_of_a_strong_decay_has_no_noise():
    """Only pairs on both sides of a step enter its gradient: where all are forgotten it vanishes, not just nearly."""
    x, _, _, B, C, _ = _make(1, 96)
    A = torch.full((HEADS,), -60.0, requires_grad=True)
    y, _ = ssd(x, torch.ones(1, 96, HEADS), A, B, C)
    (g,) = torch.autograd.grad(y.square().sum(), A)
    assert g.abs().max() < 1e-20


def test_the_strict_form_reads_no_present_at_all():
    """Exactly: without a past it is 0, and its own input has no gradient."""
    x, delta, A, B, C, _ = _make(1, 70)
    x.requires_grad_()
    y, _ = ssd(x, delta, A, B, C, strict=True)
    assert not y[:, 0].any()
    for t in (0, 40, 64):
        (g,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert not g[:, t:].any() and (t == 0 or g[:, :t].any())


def test_chunk_is_checked():
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        ssd(*_make(1, 3), chunk=0)
