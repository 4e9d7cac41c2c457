"""The results that the documentation shows are of today's settings and within the limits."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from helmholtz.experiments.letters.report import LetterResult
from helmholtz.experiments.letters.run import PROFILES
from letter_table import KAPPAS, LAW, check_bounds, check_cell, check_most

FOLDER = Path(__file__).parents[2] / "docs" / "experiments" / "plan_letters"


def cells(profile, name=None):
    content = json.loads((FOLDER / f"{name or profile}.json").read_text())
    assert content["experiment"] == asdict(PROFILES[profile])
    return {
        (cell["kappa_bits"], cell["seed"]): LetterResult.from_dict(cell["result"])
        for cell in content["cells"]
    }


@pytest.fixture(scope="module")
def ci():
    return cells("ci")


@pytest.fixture(scope="module")
def paper():
    return {kappa: result for (kappa, _), result in cells("paper").items()}


def test_the_table_is_complete(ci, paper):
    assert set(ci) == {(kappa, seed) for kappa in KAPPAS for seed in range(9)}
    assert set(paper) == {None, 1 / 64, 1 / 8, 1.0, 8.0}


def test_every_cell_is_within_its_limits(ci):
    """The limits were changed after seeds 3 to 14 were seen; seeds 15 to 17 were trained after that."""
    fresh = cells("ci", "ci_seeds_12_to_14") | cells("ci", "ci_seeds_15_to_17")
    for found in (ci, cells("ci", "ci_second_processor"), fresh):
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
