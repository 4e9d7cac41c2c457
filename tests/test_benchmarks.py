"""Benchmarks and experiments write where git looks away, unless they are told to renew what is committed."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if not path.name.startswith("_"))
OTHERS = [
    path for folder in ("examples", "tools", "tests/faults") for path in sorted((ROOT / folder).glob("*.py"))
]


@pytest.fixture
def timing():
    spec = importlib.util.spec_from_file_location("_timing", ROOT / "benchmarks" / "_timing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_timing"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_timing"]


def options(timing, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return timing.parse_options("ssd", None)


def test_only_renew_replaces_a_committed_result(timing, monkeypatch, tmp_path):
    assert "/results/" in (ROOT / ".gitignore").read_text().splitlines()
    assert options(timing, monkeypatch).output == ROOT / "results" / "benchmarks" / "ssd.json"
    committed = options(timing, monkeypatch, "--renew").output
    assert committed == ROOT / "benchmarks" / "results" / "ssd.json" and committed.exists()
    assert options(timing, monkeypatch, f"--output={tmp_path}/x.json").output == tmp_path / "x.json"
    with pytest.raises(SystemExit):
        options(timing, monkeypatch, "--renew", "--output=x.json")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_writes_through_the_common_options_alone(path):
    text = path.read_text()
    assert "parse_options(" in text and "write_results(options" in text
    assert not re.search(r"write_text|write_bytes|open\(|savefig", text)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_no_script_writes_into_the_documentation_by_default(path):
    assert not re.search(r"default=(Path\()?[\"'](docs|benchmarks)", path.read_text())
