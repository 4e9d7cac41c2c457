"""What every study has from its base class and from the command that drives it."""

import io
import json

import pytest
from rich.console import Console

from helmholtz.cli import study as command
from helmholtz.experiments.base import make_table, spread_text
from helmholtz.experiments.queue import spread
from study_cases import Numbers, call_study


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``helmholtz study numbers ...`` with results in a folder of its own."""
    monkeypatch.setitem(command.STUDIES, "numbers", "squares of seeds")
    monkeypatch.setattr(command, "load_study", lambda name: Numbers)
    return lambda *arguments: call_study(capsys, "numbers", *arguments, f"--output={tmp_path / 'out'}")


def test_a_queue_is_shared_resumed_listed_and_reported(call, tmp_path):
    code, out, _ = call("run", "--seeds", 3, 4, 5, "--shard=1/2")
    assert code == 0 and "number-4: done in" in out and "1 of 1 runs computed" in out
    assert "number-4     16" in out and "2 of 3 runs are missing" in out
    code, out, _ = call("list", "--seeds", 3, 4, 5)
    assert [line.split()[0] for line in out.splitlines()] == ["missing", "done", "missing", "2"]
    code, out, _ = call("run", "--seeds", 3, 4, 5)
    assert code == 0 and "number-4: done before" in out and "2 of 3 runs computed" in out
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {
        "rows": [{"run": f"number-{n}", "square": str(n * n)} for n in (3, 4, 5)], "runs": 3, "missing": [],
    }  # fmt: skip
    code, out, _ = call("report", "--seeds", 3, 4, 5, 6)
    assert code == 0 and "1 of 4 runs are missing" in out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["missing"] == ["number-6"]


def test_a_terminal_sees_how_far_the_queue_and_the_run_are(tmp_path):
    stream = io.StringIO()
    values = {"seeds": [0, 1], "output": str(tmp_path), "shard": "0/1", "threads": 1}
    command.compute(Numbers("run", values), Console(file=stream, force_terminal=True, width=80))
    assert "2/2 runs" in stream.getvalue() and "1/2 number-1" in stream.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "action must be one of ['list', 'report', 'run'], got 'rum'; did you mean 'run'?"),
        (["run", "--seeds", "1", "1"], "seeds must be without repetition, got [1, 1]"),
        (["run", "--seeds=-1"], "seeds must be an integer of at least 0, got -1"),
        (["run", "--threads=0"], "threads must be an integer of at least 1, got 0"),
        (["run", "--shard=2/2"], "shard must be i/n with i from 0 to n - 1"),
        (["report"], "output must be a folder of results; helmholtz study numbers run makes them"),
        (["report", "--shard=0/2"], "unknown option --shard"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(call, tmp_path, arguments, message):
    code, _, error = call(*arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_spread_is_written_the_same_from_its_fields():
    found = spread([1.0, 2.0])
    assert spread_text(found) == "1.5000 ± 0.7071"
    assert spread_text({"mean": 1.5, "low": 1.0, "high": 2.0, "n": 2, "deviation": None}, digits=1) == "1.5"
    assert spread_text(None) == "-"


def test_a_table_has_the_columns_of_its_first_row():
    console = Console(file=io.StringIO(), width=60)
    console.print(make_table("Title", [{"name": "first", "x": "1.5", "y": "2"}, {"name": "b", "x": "10"}]))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[1:] == ["name    x y", "first 1.5 2", "b      10"]
