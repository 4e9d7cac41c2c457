import json

import numpy as np
import pytest

from helmholtz.experiments.vision import run as vision
from image_cases import TINY, write_set
from study_cases import call_study


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(vision, "DIGITS", TINY)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return write_set(tmp_path / "mine")


def call(capsys, *arguments):
    return call_study(capsys, "vision", *arguments)


def test_runs_and_report_from_the_shell(capsys, tmp_path, folder):
    common = ("--data", folder, "--seeds", 0, 1, f"--output={tmp_path / 'out'}")
    code, out, _ = call(capsys, "run", *common, "--shard=1/4")
    assert code == 0 and out.count("begins") == 1
    assert call(capsys, "run", *common)[1].count("done before") == 1
    code, out, _ = call(capsys, "report", *common)
    assert code == 0 and "0 of 4 runs are missing" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["data"], row["model"], row["seeds"]) for row in summary["rows"]] == [
        ("mine", "attention", [0, 1]),
        ("mine", "fem", [0, 1]),
    ]
    assert f"{summary['rows'][1]['test_accuracy']['mean']:.4f}" in out
    for name in ("mine-learning.png", "mine-confusion.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    text = (tmp_path / "out" / "runs.jsonl").read_text()
    assert str(tmp_path) not in text, "no path of the machine"
    runs = [json.loads(line) for line in text.splitlines()]
    assert [run["name"] for run in runs] == [f"mine-{m}-{s}" for m in ("attention", "fem") for s in (0, 1)]
    assert all(np.sum(run["result"]["confusion"]) == 10 for run in runs)
    assert all(run["timing"]["cpu_seconds"] >= 0 for run in runs)
    assert call(capsys, "run", *common)[1].count("done before") == 4


def test_a_pilot_prints_validation_by_learning_rate(capsys, tmp_path, folder):
    code, out, _ = call(
        capsys,
        "pilot",
        "--data",
        folder,
        "--models=fem",
        "--lrs",
        0.01,
        0.001,
        f"--output={tmp_path / 'p'}",
    )
    assert code == 0 and "Validation by learning rate" in out
    rows = json.loads((tmp_path / "p" / "summary.json").read_text())["rows"]
    assert [(row["model"], row["lr"], row["seed"]) for row in rows] == [
        ("fem", 0.01, 1000),
        ("fem", 0.001, 1000),
    ]
    lines = (tmp_path / "p" / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 and not any("test" in json.loads(line)["result"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "--data=digit"],
            "data must be a folder of IDX files or one of digits, fashion-mnist, got 'digit'",
        ),
        (
            ["run", "--data=FOLDER", "--models=vit"],
            "models must be one of ['attention', 'fem'], got 'vit'",
        ),
        (["pilot", "--data=FOLDER", "--lrs=-1"], "lrs must be a finite number above 0, got -1.0"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, folder, arguments, message):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    code, _, error = call(capsys, *arguments, f"--output={tmp_path / 'new'}")
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "new").rglob("*.json"))
