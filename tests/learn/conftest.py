"""Prints the rows that the tests of a learning table have recorded, also those of other processes."""

import pytest

from letter_table import COLUMNS, line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "letter_row"]
    if rows:
        terminalreporter.write_sep("-", "learning table")
        for row in [line(COLUMNS), *sorted(rows)]:
            terminalreporter.write_line(row)
