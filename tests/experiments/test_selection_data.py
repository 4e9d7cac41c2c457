"""The law of channel-wise selection against samples, series and limits; the tasks against their words."""

import math

import pytest
import torch

from helmholtz.experiments.selection.data import (
    SelectionTask,
    expected_free_energy,
    expected_gap,
    expected_maximum,
    sample_caches,
)


def test_the_expected_maximum_is_that_of_order_statistics():
    assert expected_maximum(1) == pytest.approx(0, abs=1e-12)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-12)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5, 8.0, 60.0])
def test_one_token_has_no_choice(beta):
    assert expected_free_energy(1, beta) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "beta"), [(2, 0.7), (2, 30.0), (16, 1.0), (16, 5.0), (64, 2.0), (64, 20.0)])
def test_the_law_is_the_mean_of_samples(n, beta):
    v = torch.randn(40_000, n, dtype=torch.float64)
    free = ((beta * v).logsumexp(1) - math.log(n)) / beta
    error = free.std().item() / len(free) ** 0.5
    assert abs(expected_free_energy(n, beta) - free.mean().item()) < 4 * error
    gap = v.amax(1) - free
    assert abs(expected_gap(n, beta) - gap.mean().item()) < 4 * gap.std().item() / len(gap) ** 0.5


@pytest.mark.parametrize(("beta", "cap"), [(5.0, 5.0), (20.0, 40.0), (100.0, 40.0), (100.0, 80.0)])
def test_the_law_of_a_clipped_exponent_is_the_mean_of_samples(beta, cap):
    v = torch.randn(40_000, 32, dtype=torch.float64)
    free = ((beta * v).clamp(-cap, cap).logsumexp(1) - math.log(32)) / beta
    error = free.std().item() / len(free) ** 0.5 + 1e-9
    assert abs(expected_free_energy(32, beta, cap=cap) - free.mean().item()) < 4 * error


def test_two_tokens_agree_with_an_integral_over_their_difference():
    """F = (v1 + v2) / 2 + ln(cosh(beta d / 2)) / beta with d = v1 - v2 ~ N(0, 2)."""
    d = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    density = (-d.square() / 4).exp() / math.sqrt(4 * math.pi)
    for beta in (0.05, 0.5, 3.0, 40.0):
        half = (beta * d / 2).abs()
        log_cosh = half + torch.log1p((-2 * half).exp()) - math.log(2)
        wanted = torch.trapezoid(density * log_cosh / beta, d).item()
        assert expected_free_energy(2, beta) == pytest.approx(wanted, abs=1e-9)


def test_a_small_beta_reads_half_of_it_times_the_variance():
    n, beta = 16, 0.05
    assert expected_free_energy(n, beta) == pytest.approx(beta / 2 * (1 - 1 / n), rel=2e-3)


def test_the_gap_falls_with_beta_within_its_bounds_and_the_published_numbers_hold():
    betas = (1, 2, 5, 20, 100)
    gaps = [expected_gap(64, beta) for beta in betas]
    assert gaps == sorted(gaps, reverse=True)
    assert all(0 < gap < math.log(64) / beta for gap, beta in zip(gaps, betas, strict=True))
    assert gaps == pytest.approx([1.86, 1.43, 0.74, 0.20, 0.04], abs=0.011)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_maximum(0), "n_tokens"),
        (lambda: expected_free_energy(4, 0.0), "beta"),
        (lambda: expected_free_energy(4, 1.0, cap=0.0), "cap"),
        (lambda: SelectionTask(n_tokens=1), "n_tokens"),
        (lambda: SelectionTask(n_channels=0), "n_channels"),
        (lambda: sample_caches(SelectionTask(), 0, generator=torch.Generator()), "n_sequences"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_target_of_a_maximum_is_the_largest_value_of_its_channel():
    task = SelectionTask(target="maximum", n_tokens=5, n_channels=3)
    drawn = sample_caches(task, 7, generator=torch.Generator().manual_seed(1))
    assert drawn.cache.shape == (7, 5, 3) and drawn.query.shape == (7, 1, task.width)
    for row in range(7):
        for channel in range(3):
            column = drawn.cache[row, :, channel]
            assert drawn.target[row, channel] == column.max() == column[drawn.token[row, channel]]
    assert (drawn.query == drawn.query[0]).all(), "the query says nothing"


@pytest.mark.parametrize(("n_tokens", "n_channels"), [(4, 4), (5, 3), (3, 7), (16, 2)])
def test_the_target_of_a_named_token_can_be_read_off_query_and_cache(n_tokens, n_channels):
    task = SelectionTask(target="named", n_tokens=n_tokens, n_channels=n_channels)
    drawn = sample_caches(task, 50, generator=torch.Generator().manual_seed(2))
    codes = drawn.query[:, 0, : n_channels * n_tokens].unflatten(1, (n_channels, n_tokens))
    numbers = drawn.cache[..., n_channels : n_channels + n_tokens]
    match = torch.einsum("bdc,btc->bdt", codes, numbers)  # which token carries the named number
    assert (match.sum(-1) == 1).all()
    answer = torch.einsum("bdt,btd->bd", match, drawn.cache[..., :n_channels])
    assert torch.equal(answer, drawn.target)
    assert torch.equal(match.argmax(-1), drawn.token)
    assert drawn.token.unique().numel() == n_tokens


def test_draws_are_standard_normal_and_a_function_of_the_generator():
    task = SelectionTask(n_tokens=16, n_channels=8)
    first, again, other = (
        sample_caches(task, 500, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.cache, again.cache) and not torch.equal(first.cache, other.cache)
    assert abs(first.cache.mean().item()) < 0.02 and abs(first.cache.std().item() - 1) < 0.02
