"""``make learn``: the learning table of the synthetic experiment on seeds that its limits were not set on."""

import pytest

from letter_table import KAPPAS, LAW, check_bounds, check_cell, check_most, row, run_cell

SEEDS = (3, 4, 5)


@pytest.mark.learn
@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_row(kappa, record_property):
    results = []
    for seed in SEEDS:
        results.append(run_cell(kappa, seed))
        record_property("letter_row", row(kappa, seed, results[-1]))
        check_bounds(LAW, results[-1])
        check_cell(kappa, results[-1])
    check_most(kappa, results)
