"""``helmholtz study mad``: run, resume, share, pilot, report, on sizes that train in a moment."""

import json
from dataclasses import replace

import pytest

from helmholtz.experiments.mad import run as mad_run
from helmholtz.experiments.mad.run import PROFILES
from mad_cases import profile, protocol
from study_cases import call_study


def call(capsys, *arguments):
    return call_study(capsys, "mad", *arguments)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny = profile(protocol=protocol(steps=2, n_evaluations=2))
    monkeypatch.setitem(PROFILES, "tiny", tiny)
    monkeypatch.setitem(PROFILES, "pilot", replace(tiny, models=("attention",), seeds=(7,), lrs=(1e-4, 1e-2)))


def results(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "tiny" / "results").iterdir())}


def test_run_goes_on_where_it_was_and_two_machines_share_the_work(capsys, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, out, _ = call(
        capsys, "run", "--profile=tiny", "--tasks", "compression", "--seeds", 0, f"--output={one}"
    )
    assert code == 0 and "2 of 2 runs computed" in out
    assert "compression-baseline-attention-lr0.001-wd0.1-fan_in-seed0: done in" in out
    code, out, _ = call(capsys, "run", "--profile=tiny", f"--output={one}")
    assert code == 0 and "6 of 8 runs computed" in out and out.count("done before") == 2
    for share in ("0/2", "1/2"):
        assert call(capsys, "run", "--profile=tiny", f"--shard={share}", f"--output={two}")[0] == 0
    assert results(one) == results(two) and len(results(one)) == 8
    content = json.loads(next(iter(results(one).values())))
    assert content["settings"]["protocol"]["accuracy"] == "batch_macro"
    assert {"score", "final", "best", "curve", "parameters"} <= content["result"].keys()


def test_report_says_what_there_is_and_what_is_missing(capsys, tmp_path):
    call(capsys, "run", "--profile=tiny", "--seeds", 0, f"--output={tmp_path}")
    call(capsys, "run", "--profile=tiny", "--seeds=1", "--models", "attention", f"--output={tmp_path}")
    code, out, _ = call(capsys, "report", "--profile=tiny", f"--output={tmp_path}")
    assert code == 0 and "6 runs, 2 missing, 0 diverged" in out
    folder = tmp_path / "tiny"
    content = json.loads((folder / "report.json").read_text())
    assert content["missing"] == [
        f"{task}-baseline-fem_softmax-lr0.001-wd0.1-fan_in-seed1"
        for task in ("compression", "in-context-recall")
    ]
    rows = {row["model"]: row for row in content["rows"]}
    found = [
        run["result"]["score"]
        for run in map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
        if run["name"].startswith("compression-baseline-attention")
    ]
    cell = rows["attention"]["tasks"]["compression"]
    assert cell["n"] == 2 and cell["mean"] == pytest.approx(sum(found) / 2)
    assert rows["fem_softmax"]["tasks"]["compression"]["deviation"] is None
    text = (folder / "report.md").read_text()
    size = f"{rows['attention']['parameters'] / 1000:.0f} k"
    assert f"| attention | {size} | {100 * cell['mean']:.1f} ± {100 * cell['deviation']:.1f} |" in text
    assert "| FEM-SM (Lu & Yang 2026) |  | 53.1 | 99.9 | 80.2 |" in text
    assert "Missing (2):" in text and "| compression | attention | FEM softmax (C, L, T, G) | +8.8 |" in text
    assert "FEM-SM" in out and "± " in out
    for name in ("accuracy.png", "curves.png"):
        assert (folder / name).stat().st_size > 10_000


def test_the_pilot_writes_the_rates_when_it_is_whole(capsys, tmp_path):
    code, out, _ = call(capsys, "pilot", "--tasks", "compression", f"--output={tmp_path}")
    assert code == 0 and "2 runs of the pilot are missing" in out
    assert not (tmp_path / "learning_rates.json").exists()
    code, out, _ = call(capsys, "pilot", f"--output={tmp_path}")
    content = json.loads((tmp_path / "learning_rates.json").read_text())
    for task, rates in content["learning_rates"].items():
        assert list(rates) == ["attention"]
        tried = {t["lr"]: -t["loss"] for t in content["tried"] if t["task"] == task}
        assert sorted(tried) == [1e-4, 1e-2] and tried[rates["attention"]] == max(tried.values())
    assert {(t["model"], t["initialization"]) for t in content["tried"]} == {("attention", "fan_in")}
    assert {t["seed"] for t in content["tried"]} == {7} and content["protocol"]["steps"] == 2
    assert f"LEARNING_RATES = {content['learning_rates']}" in out


def test_a_grid_of_starts_shows_every_seed(capsys, tmp_path, monkeypatch):
    starts = ("fan_in", "normal_0.02")
    grid = replace(
        PROFILES["tiny"], initializations=starts, lrs=(1e-3, 5e-4), extra_seeds=(2,), tasks_first=True
    )
    monkeypatch.setitem(PROFILES, "tiny", grid)
    call(capsys, "run", "--profile=tiny", "--tasks", "compression", f"--output={tmp_path}")
    call(
        capsys, "run", "--profile=tiny", "--tasks", "compression", "--models", "attention", "--seeds", 2,
        f"--output={tmp_path}",
    )  # fmt: skip
    code, out, _ = call(capsys, "report", "--profile=tiny", f"--output={tmp_path}")
    assert code == 0 and "16 of 36 runs are missing" in out and "seed 2" in out
    content = json.loads((tmp_path / "tiny" / "report.json").read_text())
    cells = {(c["model"], c["initialization"], c["lr"]): c["scores"] for c in content["cells"]}
    assert len(cells) == 8 and content["finished"] == 20
    for (model, *_), scores in cells.items():
        assert list(scores) == ["0", "1", "2"][: 3 if model == "attention" else 2]
    lines = (tmp_path / "tiny" / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| Compr.")]
    scores = cells["attention", "fan_in", 1e-3]
    first = " | ".join(f"{100 * score:.1f}" for score in scores.values())
    assert table[0].startswith(f"| Compr. | attention | fan_in | 0.001 | {first} | ") and len(table) == 8
    assert table[0].endswith("| 44.3 |") and "normal_0.02" in table[2] and "fem_softmax" in table[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile=quik"], "did you mean 'quick'?"),
        (["run", "--profile=tiny", "--models", "mambo"], "did you mean 'mamba'?"),
        (["run", "--profile=tiny", "--tasks", "copying"], "tasks must be one of"),
        (["run", "--profile=tiny", "--seeds", "-1"], "seeds must be an integer of at least 0, got -1"),
        (["report", "--profile=tiny"], "a folder of results; helmholtz study mad run makes them"),
        (["pilot", "--profile=tiny"], "unknown option --profile"),
        (["report", "--models", "mamba"], "unknown option --models"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call(capsys, *arguments, f"--output={tmp_path / 'new'}")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_quick_wants_the_pilot_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mad_run, "LEARNING_RATES", {})
    code, _, error = call(capsys, "run", f"--output={tmp_path / 'new'}")
    assert code == 2 and "a pilot has chosen a learning rate for (none yet)" in error
    assert not (tmp_path / "new").exists()
