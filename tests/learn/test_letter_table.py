"""``make learn``: the learning table of the synthetic experiment on seeds that its limits were not set on."""

import pytest

from letter_table import KAPPAS, LAW, check_bounds, check_cell, row, run_cell

SEEDS = (3, 4, 5)


@pytest.mark.learn
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_cell(kappa, seed, record_property):
    result = run_cell(kappa, seed)
    record_property("letter_row", row(kappa, seed, result))
    check_bounds(LAW, result)
    check_cell(kappa, result)
