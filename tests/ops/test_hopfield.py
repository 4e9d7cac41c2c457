"""The Hopfield energy against its float64 reference; bounds, descent and retrieval."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import ops, reference
from helpers import DTYPES, assert_matches, grads

NAMES = ["hopfield_weights", "hopfield_retrieve", "hopfield_potential", "hopfield_energy"]
BUDGET = 25.0  # worst measured: 8.4 eps (relative RMS over outputs and gradients)


def _case(n, d, k, empty="none", *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 0.5 * torch.randn(n, d, generator=generator)
    patterns = torch.randn(k, d, generator=generator)
    log_prior = {"none": None, "some": torch.zeros(k), "all": torch.full((k,), -torch.inf)}[empty]
    if empty == "some":
        log_prior[::2] = -torch.inf
    return z.to(dtype), patterns.to(dtype), log_prior


@pytest.mark.parametrize("empty", ["none", "some", "all"])
@pytest.mark.parametrize("size", [(1, 1, 2), (5, 7, 9), (65, 16, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name, dtype, size, empty):
    z, patterns, log_prior = _case(*size, empty, dtype=dtype)

    def of(module):
        def call(z, patterns):
            out = getattr(module, name)(z, patterns, 2.0, log_prior)
            return (out + 0 * (z.sum() + patterns.sum()),)  # an empty memory uses none of its patterns

        return call

    (out,), (expected,) = of(ops)(z, patterns), of(reference)(z, patterns)
    assert_matches(name, out, expected, budget=BUDGET)
    cotangent = [torch.randn(expected.shape, dtype=torch.float64).to(out.dtype).double()]
    pairs = zip(
        grads(of(ops), (z, patterns), cotangent), grads(of(reference), (z, patterns), cotangent), strict=True
    )
    for what, (got, wanted) in zip(("z", "patterns"), pairs, strict=True):
        assert_matches(f"gradient of {what}", got, wanted, budget=BUDGET)


@given(
    n=st.integers(1, 5), d=st.integers(1, 24), k=st.integers(1, 40), seed=st.integers(0, 999),
    beta=st.sampled_from([1e-3, 0.5, 4.0, 60.0]), empty=st.sampled_from(["none", "some", "all"]),
)  # fmt: skip
def test_bounds_and_descent(n, d, k, seed, beta, empty):
    z, patterns, log_prior = _case(n, d, k, empty, seed=seed)
    call = (patterns, beta, log_prior)
    weights, step = ops.hopfield_weights(z, *call), ops.hopfield_retrieve(z, *call)
    energy, after = ops.hopfield_energy(z, *call), ops.hopfield_energy(step, *call)
    stored = patterns if log_prior is None else patterns[log_prior == 0]
    assert (weights >= 0).all() and (energy >= -1e-9).all()
    assert (after <= energy - (step - z).square().sum(-1) / 2 + 1e-9 * (1 + energy)).all()
    if not len(stored):
        assert not weights.any() and not step.any() and not ops.hopfield_potential(z, *call).any()
        return
    torch.testing.assert_close(weights.sum(-1), torch.ones(n).double())
    scores, potential = z @ stored.T, ops.hopfield_potential(z, *call)
    assert (potential >= scores.mean(-1) - 1e-9).all() and (potential <= scores.amax(-1) + 1e-9).all()
    largest = stored.square().sum(-1).amax()
    hull = step.square().sum(-1)
    assert (hull <= largest * (1 + 1e-9)).all()  # a mean of patterns
    assert (after <= 2 * largest + 1e-9).all()  # Ramsauer et al. 2020, lemma A1: 0 <= E <= 2 M^2
    at = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ops.hopfield_potential(at, *call).sum(), at)
    torch.testing.assert_close(slope, step)


def test_a_memory_without_rows_is_empty():
    z = torch.randn(3, 4)
    none = torch.zeros(0, 4)
    assert ops.hopfield_weights(z, none, 2.0).shape == (3, 0)
    assert torch.equal(ops.hopfield_retrieve(z, none, 2.0), torch.zeros(3, 4))
    assert torch.equal(ops.hopfield_potential(z, none, 2.0), torch.zeros(3))
    torch.testing.assert_close(ops.hopfield_energy(z, none, 2.0), z.square().sum(-1) / 2)


def test_leading_dimensions_and_what_empty_rows_hold():
    z, patterns, log_prior = _case(6, 5, 8, "some", dtype=torch.float32)
    rubbish = patterns.clone()
    rubbish[::2] = 50.0
    for name in NAMES:
        op = getattr(ops, name)
        flat = op(z, patterns, 2.0, log_prior)
        torch.testing.assert_close(op(z.view(2, 3, 5), patterns, 2.0, log_prior).flatten(0, 1), flat)
        assert torch.equal(op(z, rubbish, 2.0, log_prior), flat)


@pytest.mark.parametrize("d_model", [32, 64])
def test_a_stored_pattern_is_retrieved_above_the_margin_and_not_below(d_model):
    generator = torch.Generator().manual_seed(0)
    radius = d_model**0.25
    for n_patterns in (512, 4096):
        patterns = torch.randn(n_patterns, d_model, generator=generator)
        patterns = radius * patterns / patterns.norm(dim=-1, keepdim=True)
        z = patterns[:64]
        for _ in range(20):
            z = ops.hopfield_retrieve(z, patterns, 2.0)
        found = ((z @ patterns.T).argmax(-1) == torch.arange(64)).float().mean().item()
        margin = ops.retrieval_margin(d_model, n_patterns, 2.0, radius)
        assert (found > 0.99) if margin >= 3 else (found < 0.1)


def test_margin_in_numbers():
    assert ops.retrieval_margin(64, 512, 2.0, 64**0.25) == pytest.approx(16 - 2 - math.log(512))
    assert ops.retrieval_margin(32, 4096, 2.0, 32**0.25) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_is_checked(name, beta):
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        getattr(ops, name)(torch.zeros(2, 3), torch.zeros(4, 3), beta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 2.0, 1.0), "d_model"), ((4, 0, 2.0, 1.0), "n_patterns"), ((4, 4, 2.0, 0.0), "radius")],
)
def test_margin_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        ops.retrieval_margin(*arguments)
