"""The results that the documentation shows are of today's settings and within the limits."""

from dataclasses import asdict
from pathlib import Path

import pytest

from helmholtz.experiments.letters.report import LetterResult
from helmholtz.experiments.letters.run import PROFILES
from helmholtz.experiments.letters.study import DISTRIBUTION
from helmholtz.experiments.records import read_lines
from letter_table import KAPPAS, LAW, check_bounds, check_cell, check_most

FOLDER = Path(__file__).parents[2] / "docs" / "experiments" / "plan_letters"


def models(profile, folder):
    """Results by kappa and seed."""
    found = {}
    for run in read_lines(FOLDER / folder / "runs.jsonl").values():
        if run["name"] != DISTRIBUTION:
            assert run["settings"]["experiment"] == asdict(PROFILES[profile])
            key = run["settings"]["kappa_bits"], run["settings"]["seed"]
            found[key] = LetterResult.from_dict(run["result"]["result"])
    return found


@pytest.fixture(scope="module")
def ci():
    return models("ci", "ci")


@pytest.fixture(scope="module")
def paper():
    return {kappa: result for (kappa, _), result in models("paper", "paper").items()}


def test_the_table_is_complete(ci, paper):
    assert set(ci) == {(kappa, seed) for kappa in KAPPAS for seed in (*range(9), 12, 13, 14)} | {
        (kappa, seed) for kappa in (None, 1.0, 4.0) for seed in (15, 16, 17)
    }
    assert set(paper) == {None, 1 / 64, 1 / 8, 1.0, 8.0}


def test_every_cell_is_within_its_limits(ci):
    """The limits were changed after seeds 3 to 14 were seen; seeds 15 to 17 were trained after that."""
    for found in (ci, models("ci", "ci_second_processor")):
        for (kappa, _), result in found.items():
            check_bounds(LAW, result)
            check_cell(kappa, result)
        for kappa in {kappa for kappa, _ in found}:
            results = [found[kappa, seed] for _, seed in sorted(key for key in found if key[0] == kappa)]
            for three in batched(results):
                check_most(kappa, three)


def batched(results):
    assert len(results) % 3 == 0
    return [results[i : i + 3] for i in range(0, len(results), 3)]


def test_at_the_papers_size_plans_hold_nothing_the_place_the_noise_and_a_copy(paper):
    for result in paper.values():
        check_bounds(PROFILES["paper"].law, result)
    nothing, place, noise, copy = (paper[kappa] for kappa in (1 / 64, 1 / 8, 1.0, 8.0))
    assert abs(nothing.bounds.posterior_cross_entropy - nothing.bounds.law) < 0.01
    uniform = PROFILES["paper"].law.n_starts / 4  # median absolute deviation of a uniform start
    assert place.shared.spread < 0.5 * uniform < 0.6 * uniform < nothing.shared.spread
    assert place.shared.noise_repetition < 0.1 < noise.shared.noise_repetition
    assert copy.bounds.posterior_cross_entropy < noise.bounds.posterior_cross_entropy < 0.2
    assert copy.independent.valid < 0.3 < noise.independent.valid
