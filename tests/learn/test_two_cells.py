"""Two cells of the learning table in every run of the tests: plans that hold nothing, and the place of the run."""

import pytest

from letter_table import LAW, check_bounds, check_cell, row, run_cell


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kappa", [1 / 64, 1 / 4])
def test_cell(kappa, record_property):
    result = run_cell(kappa, 3)
    record_property("letter_row", row(kappa, 3, result))
    check_bounds(LAW, result)
    check_cell(kappa, result)
