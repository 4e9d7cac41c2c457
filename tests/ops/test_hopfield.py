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


def random_patterns(n_patterns, d_model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_patterns, d_model, generator=generator, dtype=torch.float64)
    return d_model**0.25 * torch.nn.functional.normalize(rows, dim=-1)


def settled(patterns, beta, steps=200):
    """Where retrieval from each pattern ends."""
    z = patterns
    for _ in range(steps):
        z = ops.hopfield_retrieve(z, patterns, beta)
    return z


@pytest.mark.parametrize("empty", ["none", "some", "all"])
@pytest.mark.parametrize("size", [(1, 3), (7, 9), (16, 130), (3, 1), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_match_their_reference(dtype, size, empty, monkeypatch):
    monkeypatch.setattr("helmholtz.ops.hopfield.MARGIN_SCORES", 400)  # several blocks
    _, patterns, log_prior = _case(1, *size, empty, dtype=dtype)
    got = ops.pattern_margins(patterns, 2.0, log_prior)
    wanted = reference.pattern_margins(patterns, 2.0, log_prior)
    assert torch.equal(got.isposinf(), wanted.isposinf()) and not got.isnan().any()
    scale = (2.0 * patterns.double().square().sum(-1)).amax() if len(patterns) else 1.0
    kept = wanted.isfinite()
    assert (got.double() - wanted)[kept].abs().le(8 * torch.finfo(got.dtype).eps * (scale + 1)).all()
    some = torch.arange(0, len(patterns), 3)
    chosen = ops.pattern_margins(patterns, 2.0, log_prior, chosen=some)
    torch.testing.assert_close(chosen, got[some])


def test_margins_are_the_log_odds_of_a_pattern_at_its_own_place():
    patterns = random_patterns(20, 8)
    own = ops.hopfield_weights(patterns, patterns, 1.5).diagonal()
    torch.testing.assert_close(ops.pattern_margins(patterns, 1.5), own.logit())


@given(
    k=st.integers(2, 40), d=st.integers(1, 24), seed=st.integers(0, 999), scale=st.floats(0.1, 10),
    low=st.floats(0.01, 20), factor=st.floats(1, 10),
)  # fmt: skip
def test_margins_grow_with_beta_which_counts_as_a_squared_norm(k, d, seed, scale, low, factor):
    patterns = random_patterns(k, d, seed)
    at, above = (ops.pattern_margins(patterns, beta) for beta in (low, factor * low))
    assert (above >= at - 1e-9 * (1 + at.abs())).all()
    torch.testing.assert_close(ops.pattern_margins(scale * patterns, low / scale**2), at)


@pytest.mark.parametrize("beta", [16.0, 50.0, 200.0])
def test_margins_of_separated_patterns_at_a_large_beta(beta):
    """Recall is perfect; the margin is beta times the distance to the closest score, less what the others add."""
    patterns = random_patterns(100, 64)
    products = patterns @ patterns.T
    gap = products.diagonal() - products.clone().fill_diagonal_(-math.inf).amax(-1)
    margins = ops.pattern_margins(patterns, beta)
    assert (margins <= beta * gap + 1e-9).all() and (margins >= beta * gap - math.log(99)).all()
    assert margins.amin() > 50
    assert torch.equal((settled(patterns, beta) @ patterns.T).argmax(-1), torch.arange(100))
    expected = ops.retrieval_margin(64, 100, beta, 64**0.25)
    assert expected == pytest.approx(margins.median().item(), rel=0.15)


def test_margins_of_nearly_parallel_patterns():
    """All scores are alike: a pattern has one part in K, and recall ends between them."""
    common, rows = random_patterns(1, 64), random_patterns(5, 64, 1)
    patterns = 64**0.25 * torch.nn.functional.normalize(common + 0.02 * rows, dim=-1)
    margins = ops.pattern_margins(patterns, 2.0)
    torch.testing.assert_close(
        margins, torch.full((5,), -math.log(4), dtype=torch.float64), atol=0.02, rtol=0
    )
    ends = settled(patterns, 2.0)
    assert (ends - ends.mean(0)).norm(dim=-1).amax() < 1e-3
    assert ops.retrieval_margin(64, 5, 2.0, 64**0.25) > 12  # what random directions would have


@pytest.mark.parametrize("cosine", [0.95, 0.9, 0.8])
def test_two_patterns_share_an_equilibrium_below_two_nats(cosine):
    """The weights of +-a are tanh(2 beta |a|^2 t): two equilibria where 2 beta |a|^2 = margin > 2 (eq. 12)."""
    pair = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    for margin in (1.8, 2.2):
        beta = margin / (1 - cosine)
        assert ops.pattern_margins(pair, beta).tolist() == pytest.approx([margin, margin])
        first, second = settled(pair, beta, 500)
        apart = (first - second).norm()
        assert (apart > 0.1 * math.sqrt(2 - 2 * cosine)) == (margin > 2)


@pytest.mark.parametrize("d", [4, 8, 16, 32])
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0, 20.0])
def test_the_margin_says_what_is_recalled(d, beta):
    """Of random draws: from 3 nats a pattern is recalled, below 0 it never has most of the weight at the end."""
    for seed, k in enumerate((3, 20, 100, 300)):
        patterns = random_patterns(k, d, seed)
        margins, radius = ops.pattern_margins(patterns, beta), d**0.25
        ends = settled(patterns, beta, 50)
        assert ((ends @ patterns.T).argmax(-1) == torch.arange(k))[margins >= 3].all()
        assert (ops.hopfield_weights(ends, patterns, beta).diagonal() < 0.5)[margins < 0].all()
        proven = margins >= 1 + math.log(4 * beta * radius**2)  # eq. 12
        assert ((ends - patterns).norm(dim=-1)[proven] <= 1 / (2 * beta * radius)).all()


@pytest.mark.parametrize(
    ("d_model", "n_patterns", "beta"),
    [
        (16, 8, 2.0),
        (32, 512, 2.0),
        (64, 1000, 2.0),
        (64, 100, 0.5),
        (64, 100, 16.0),
        (64, 100, 200.0),
        (64, 2, 2.0),
    ],
)
def test_random_directions_have_the_expected_margin(d_model, n_patterns, beta):
    expected = ops.retrieval_margin(d_model, n_patterns, beta, d_model**0.25)
    median = torch.stack(
        [ops.pattern_margins(random_patterns(n_patterns, d_model, s), beta).median() for s in range(20)]
    ).mean()
    assert -0.15 * abs(median) - 0.3 < expected - median < 0.3


def test_expected_margin_in_numbers():
    """Nearly the classical estimate where beta R^2 is small: the others' scores are normal and none is rare."""
    estimate = 16 - 16**2 / 128 - math.log(511)
    assert ops.retrieval_margin(64, 512, 2.0, 64**0.25) == pytest.approx(estimate, abs=0.1)
    assert ops.retrieval_margin(32, 4096, 2.0, 32**0.25) == pytest.approx(1.1, abs=0.05)
    assert ops.retrieval_margin(64, 1, 2.0, 64**0.25) == math.inf
    values = [ops.retrieval_margin(64, 100, beta, 64**0.25) for beta in (0.01, 0.1, 1.0, 10.0, 100.0, 1e4)]
    assert values == sorted(values) and values[0] == pytest.approx(-math.log(99), abs=0.1)


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
