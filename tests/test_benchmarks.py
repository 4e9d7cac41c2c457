"""Benchmarks and experiments write where git looks away, unless they are told to renew what is committed."""

import importlib.util
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from helmholtz import kernels

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if not path.name.startswith("_"))
OTHERS = [
    path for folder in ("examples", "tools", "tests/faults") for path in sorted((ROOT / folder).glob("*.py"))
]


def load(monkeypatch, path):
    """A script as a module, with the ones beside it that it imports."""
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(ROOT / folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def timing(monkeypatch):
    return load(monkeypatch, ROOT / "benchmarks" / "_timing.py")


def options(timing, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return timing.parse_options("layers_speed", None)


def test_only_renew_replaces_a_committed_result(timing, monkeypatch, tmp_path):
    assert "/results/" in (ROOT / ".gitignore").read_text().splitlines()
    assert options(timing, monkeypatch).output == ROOT / "results" / "benchmarks" / "layers_speed.json"
    committed = options(timing, monkeypatch, "--renew").output
    assert committed == ROOT / "benchmarks" / "results" / "layers_speed.json" and committed.exists()
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


def test_every_benchmark_is_a_part_of_all(monkeypatch):
    measure = load(monkeypatch, ROOT / "tools" / "measure.py")
    assert {ROOT / "benchmarks" / part.script for part in measure.PARTS.values()} == set(SCRIPTS)


@pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
def test_every_kernel_is_measured(monkeypatch):
    found = load(monkeypatch, ROOT / "benchmarks" / "ops" / "kernels.py")
    measured = {name for case in found.CASES.values() for name in found.called(case)}
    assert measured == set(kernels.NAMES) - found.STEPS


def test_tables_are_made_of_the_committed_results(monkeypatch):
    tables = load(monkeypatch, ROOT / "tools" / "tables.py")
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.MARKED.search(text) and tables.filled(text) == text


def test_two_commits_are_measured_in_turn(timing, monkeypatch):
    """Each process runs once, hands over and waits; one that has ended holds the other up no more."""
    order: list[str] = []
    (a_read, b_write), (b_read, a_write) = os.pipe(), os.pipe()
    first, second = timing, load(monkeypatch, ROOT / "benchmarks" / "_timing.py")
    first.TURNS, second.TURNS = (a_read, a_write, "first"), (b_read, b_write, "second")

    def work(module, name, rounds):
        if name == "b":
            os.read(b_read, 1)
        module.interleave({name: lambda: order.append(name)}, rounds=rounds, warmup=0)
        os.close(module.TURNS[1])

    thread = threading.Thread(target=work, args=(second, "b", 4))
    thread.start()
    work(first, "a", 2)
    thread.join()
    assert order == ["a", "b", "a", "b", "b", "b"]
    os.close(a_read), os.close(b_read)
