"""The fused read at the ends of its blocks, and where numbers are extreme; more of it is in tests/ops."""

import pytest
import torch
from torch import Tensor

from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.free_energy import softmax_read
from helmholtz.ops.triton import softmax_read as module
from helmholtz.reference import free_energy as reference
from helpers import assert_matches, grads

NAMES = ["dq", "dk", "dv", "dbeta"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 16 queries and 16 keys, so that few tokens fill several."""
    monkeypatch.setattr(module, "_choose", lambda *_: module._blocks(16, 16, 4, 1))


def problem(shape, dtype=torch.float32, scale=1.0):
    b, h, g, t, s, k, v = shape
    q, keys, values = torch.randn(b, h, t, k), torch.randn(b, g, s, k), scale * torch.randn(b, g, s, v)
    return *(x.to(dtype) for x in (q, keys, values)), torch.rand(g, v) + 0.5


def assert_read(inputs, *, budget=8, **options):
    options = {"cap": 40.0} | options
    both = [lambda *x, fn=fn: [fn(*x, **options)] for fn in (softmax_read, reference.softmax_read)]
    (actual,), (expected,) = (fn(*inputs) for fn in both)
    for n, name in enumerate(["mean", "partition"]):
        assert_matches(name, actual[..., n, :], expected[..., n, :], budget=budget)
    cotangents = [torch.randn(actual.shape).double()]
    for name, got, want in zip(NAMES, *(grads(fn, inputs, cotangents) for fn in both), strict=True):
        assert got.isfinite().all(), name
        assert_matches(name, got, want, budget=4 * budget)


SHAPES = [
    (1, 2, 1, 33, 33, 5, 4),
    (2, 2, 2, 16, 32, 16, 16),
    (1, 4, 2, 17, 50, 3, 17),
    (1, 1, 1, 1, 31, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_several_blocks_match_the_reference(shape, causal, masked, small_blocks):
    mask = None
    if masked:
        mask = torch.rand(shape[0], shape[4]) > 0.4
        mask[:, 0] = False  # the first queries of a causal sequence see nothing
    assert_read(problem(shape), causal=causal, key_mask=mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 1, 16, 50], [0, 18, 20, 33, 50]], ids=str)
def test_packed_sequences_are_read_alone(causal, bounds, small_blocks):
    *qkv, beta = inputs = [x.requires_grad_() for x in problem((1, 4, 2, 50, 50, 4, 5))]
    options = {"cap": 40.0, "causal": causal}
    packed = softmax_read(*inputs, **options, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = [[x[:, :, a:b] for x in qkv] for a, b in zip(bounds, bounds[1:], strict=False)]
    alone = torch.cat([reference.softmax_read(*part, beta, **options) for part in parts], dim=2)
    cotangent = torch.randn(packed.shape)
    got = packed, *torch.autograd.grad(packed, inputs, cotangent)
    want = alone, *torch.autograd.grad(alone, inputs, cotangent.double())
    for name, a, e in zip(["read", *NAMES], got, want, strict=True):
        assert_matches(name, a, e, budget=32)


def test_a_mixer_without_a_temperature_reads_the_mean_under_a_mask(small_blocks):
    q, k, v, _ = problem((2, 4, 2, 20, 20, 4, 5))
    mask = torch.rand(2, 20) > 0.4
    got, want = (f(q, k, v, key_mask=mask) for f in (softmax_attention, reference.softmax_attention))
    assert_matches("mean", got, want, budget=8)


def test_the_largest_exponents_are_clipped_on_both_sides(small_blocks):
    """Values at the cap and far beyond it: the partition function and its gradients stay finite and right."""
    q, k, v, beta = problem((1, 2, 2, 20, 20, 8, 6), scale=100.0)
    assert (beta.unsqueeze(1) * v).abs().max() > 40
    assert_read((q, k, v, beta), budget=64)
    assert_read((q, k, v.sign() * 40 / beta.unsqueeze(1), beta), budget=64, cap=39.0)


def test_who_sees_nothing_reads_nothing_and_has_no_gradient(small_blocks):
    q, k, v, beta = (x.requires_grad_() for x in problem((2, 2, 2, 20, 20, 4, 5)))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0], mask[1, :18] = False, False
    read = softmax_read(q, k, v, beta, cap=40.0, key_mask=mask)
    assert not read[0].any() and not read[1, :, :18].any() and read[1, :, 18:].all()
    found = torch.autograd.grad(read.square().sum(), (q, k, v, beta))
    assert all(x.isfinite().all() for x in found)
    assert not any(x[0].any() for x in found[:3])


def test_large_scores_overflow_nothing(small_blocks):
    q, k, v, beta = problem((1, 1, 1, 20, 40, 8, 6))
    inputs = [x.requires_grad_() for x in (30 * q, 30 * k, v, beta)]
    read = softmax_read(*inputs, cap=40.0, causal=False)
    want = reference.softmax_read(*inputs, cap=40.0, causal=False)
    torch.testing.assert_close(read, want.float(), rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(read.sum(), inputs))


def free(mixed: Tensor, beta: Tensor) -> Tensor:
    return mixed[..., 1, :].double().log() / beta.unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [1e-3, 2e-3, 1.0, 8.0])
def test_half_precision_holds_the_free_energy_at_its_own_blocks(dtype, beta):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 150, 32), torch.randn(1, 1, 150, 32), torch.randn(1, 1, 150, 16)
    q, k, v, rate = (2 * q).to(dtype), k.to(dtype), v.to(dtype), torch.full((1, 16), beta)
    got, want = (fn(q, k, v, rate, cap=40.0) for fn in (softmax_read, reference.softmax_read))
    exact, seen = free(want, rate), v.double().cummax(2).values - v.double().cummin(2).values
    assert ((free(got, rate) - exact).abs() <= 2**-8 * (exact.abs() + seen)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_stay_within_its_rounding(dtype, small_blocks):
    inputs = problem((1, 4, 2, 35, 35, 8, 6), dtype)
    both = [lambda *x, fn=fn: [fn(*x, cap=40.0)] for fn in (softmax_read, reference.softmax_read)]
    cotangents = [torch.randn(1, 4, 35, 2, 6).double()]
    for name, got, want in zip(NAMES, *(grads(fn, inputs, cotangents) for fn in both), strict=True):
        assert (got.double() - want).abs().max() <= 2 * 2**-7 * want.abs().max(), name
