"""Recall from a Hopfield memory: corruption, measures, and the table against its oracle."""

from dataclasses import replace

import pytest
import torch

from helmholtz.experiments.recall.patterns import (
    Corruption,
    auroc,
    by_size_and_level,
    oracle_recall,
    recall_patterns,
    recall_values,
)


def test_corruptions_do_what_they_say():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(50, 40, generator=generator)
    noisy = Corruption("noise", 0.7).apply(patterns, generator=generator)
    torch.testing.assert_close((noisy - patterns).norm(dim=1), 0.7 * patterns.norm(dim=1))
    masked = Corruption("mask", 0.25).apply(patterns, generator=generator)
    assert ((masked == 0).sum(1) == 10).all() and ((masked == patterns).sum(1) == 30).all()
    flipped = Corruption("flip", 0.5).apply(patterns, generator=generator)
    assert ((flipped == -patterns).sum(1) == 20).all() and ((flipped == patterns).sum(1) == 20).all()
    assert not torch.equal(masked[0] == 0, masked[1] == 0)
    assert torch.equal(Corruption("noise", 0.0).apply(patterns, generator=generator), patterns)


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("noise", -0.1, "level must be a finite number"),
        ("mask", 1.5, r"level must be in \[0, 1\]"),
        ("flip", -1, "level must be"),
    ],
)
def test_corruptions_are_checked(kind, level, message):
    with pytest.raises(ValueError, match=message):
        Corruption(kind, level)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d_model", "n_patterns", "corruption", "low", "high"),
    [
        (64, 512, Corruption("noise", 0.0), 1.0, 1.0),
        (64, 512, Corruption("noise", 0.5), 0.99, 1.0),
        (64, 512, Corruption("noise", 1.5), 0.94, 0.99),
        (32, 64, Corruption("noise", 1.5), 0.80, 0.92),
        (32, 512, Corruption("noise", 1.0), 0.75, 0.90),
        (64, 512, Corruption("mask", 0.5), 0.85, 0.96),
    ],
    ids=str,
)
def test_the_table_and_its_oracle(d_model, n_patterns, corruption, low, high):
    result = recall_patterns(d_model, n_patterns, corruption, n_trials=1000)
    assert result.agrees() and result.n_trials == 1000 and result.n_sets == 5
    assert low <= result.accuracy <= high
    assert result.accuracy <= result.nearest + 0.02
    assert abs(result.strict - result.accuracy) < 0.01
    crowded = (d_model, n_patterns) == (32, 512)  # some of its patterns have a close neighbour, 2.2 nats away
    assert result.warned == (result.margin < 3) == crowded and result.converged == 1


@pytest.mark.slow
def test_a_crowded_memory_fails_and_says_so():
    result = recall_patterns(32, 4096, Corruption("noise", 0.0), n_trials=60, n_sets=2)
    assert result.warned and result.margin == pytest.approx(0.8, abs=0.1)
    assert result.accuracy < 0.05 and result.nearest == 1 and result.oracle < 0.05
    assert result.energy_hit is None or result.accuracy > 0
    assert result.energy_miss is not None


def test_a_result_disagrees_beyond_the_error():
    result = recall_patterns(16, 8, Corruption("noise", 0.5), n_trials=100, n_sets=1)
    wrong = replace(result, accuracy=result.oracle - 0.3)
    assert result.agrees() and not wrong.agrees()
    assert result.to_dict()["agrees"] and not wrong.to_dict()["agrees"]
    again = recall_patterns(16, 8, Corruption("noise", 0.5), n_trials=100, n_sets=1)
    other = recall_patterns(16, 8, Corruption("noise", 0.5), n_trials=100, n_sets=1, seed=1)
    assert again == result and other != result
    assert by_size_and_level([result, other]) == {8: {0.5: other.accuracy}}
    with pytest.raises(ValueError, match="results must be of one width"):
        by_size_and_level([result, replace(result, d_model=32)])


def test_the_oracle_is_the_fixed_point_of_the_retrieval():
    patterns, query = torch.randn(6, 10), torch.randn(4, 10)
    z = oracle_recall(query, patterns, 2.0)
    step = (2.0 * z @ patterns.double().T).softmax(-1) @ patterns.double()
    torch.testing.assert_close(step, z, atol=1e-3, rtol=1e-3)


def test_auroc_counts_pairs():
    high, low = torch.tensor([3.0, 5.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()
    wins = sum((h > x) + 0.5 * (h == x) for h in high.tolist() for x in low.tolist())
    assert auroc(high, low) == pytest.approx(wins / 6)
    assert auroc(high, low[:0]) is None and auroc(low[:0], low) is None


@pytest.mark.slow
@pytest.mark.parametrize("beta", [4.0, 8.0])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_values_of_500_keys(beta, noise):
    result = recall_values(32, 500, beta=beta, noise=noise, n_trials=200, n_sets=1)
    assert result.accuracy == result.oracle == 1 and result.agrees()
    assert result.num_steps_mean < 4 and (noise or result.answered == 1)
