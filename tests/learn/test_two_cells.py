"""Two cells of the learning table in every run of the tests: no plan, and as many free bits as the code has."""

import pytest

from letter_table import LAW, check_bounds, check_cell, row, run_cell


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kappa", [None, 4.0])
def test_cell(kappa, record_property):
    result = run_cell(kappa, 3)
    record_property("letter_row", row(kappa, 3, result))
    check_bounds(LAW, result)
    check_cell(kappa, result)
