"""The report of the committed results, built once per process."""

from pathlib import Path

import pytest

from helmholtz.experiments.report.page import build_sections, render

ROOT = Path(__file__).parents[2]
FOLDERS = [Path("docs/experiments"), Path("benchmarks/results")]


@pytest.fixture(scope="session")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return render(build_sections(FOLDERS), FOLDERS)
