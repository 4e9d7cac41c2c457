import json

import pytest

from helmholtz.experiments.forecasting import study as forecast
from series_cases import shorten, waves, write_csv
from study_cases import call_study


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture
def file(tmp_path):
    write_csv(waves(750, 2), tmp_path / "mine.csv")
    return tmp_path / "mine.csv"


def call(capsys, *arguments):
    return call_study(capsys, "forecasting", *arguments)


def test_runs_and_report_from_the_shell(capsys, tmp_path, file):
    common = ("--data", file, "--models", "dlinear", "naive", "--seeds", 0, 1, "--horizons", 12, 24)
    common = (*common, f"--output={tmp_path / 'out'}")
    code, out, _ = call(capsys, "run", *common, "--shard=0/2")
    assert code == 0
    assert out.count("begins") == 4 and "mine-dlinear-12-0: done in" in out
    code, out, _ = call(capsys, "report", *common)
    assert code == 0 and "4 of 8 runs are missing" in out
    assert call(capsys, "run", *common)[1].count("done before") == 4
    code, out, _ = call(capsys, "report", *common)
    assert code == 0 and "0 of 8 runs are missing" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["runs"], summary["missing"]) == (8, [])
    rows = {row["model"]: row for row in summary["rows"]}
    assert rows["naive"]["mse"]["n"] == 2 and rows["naive"]["mse"]["deviation"] == 0
    assert f"{rows['dlinear']['mse']['mean']:.3f} ± " in out
    for name in ("horizons.png", "mine.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    for result in (tmp_path / "out").rglob("*.json*"):
        assert str(tmp_path) not in result.read_text(), "no path of the machine"


def test_published_numbers_stand_beside_those_of_ett(capsys, tmp_path, file):
    common = (
        "--data",
        file.rename(tmp_path / "ETTh1.csv"),
        "--models=naive",
        "--seeds=0",
        "--horizons=12",
    )
    common = (*common, f"--output={tmp_path / 'out'}")
    assert call(capsys, "run", *common)[0] == 0
    _, out, _ = call(capsys, "report", *common)
    for line in (
        "paper: FEM, softmax  0.419",
        "paper: PatchTST  0.413",
        "paper: iTransformer  0.454",
    ):
        assert " ".join(line.split()) in " ".join(out.split())


def test_a_pilot_prints_validation_errors_by_learning_rate(capsys, tmp_path, file):
    code, out, _ = call(
        capsys, "pilot", "--data", file, "--models", "dlinear", "--horizons", 12, "--lrs", 0.01, 0.001,
        f"--output={tmp_path / 'pilot'}",
    )  # fmt: skip
    assert code == 0
    assert "Validation MSE by learning rate" in out
    rows = json.loads((tmp_path / "pilot" / "summary.json").read_text())["rows"]
    assert [(row["model"], row["lr"]) for row in rows] == [("dlinear", 0.01), ("dlinear", 0.001)]
    results = [json.loads(line) for line in (tmp_path / "pilot" / "runs.jsonl").read_text().splitlines()]
    assert len(results) == 2 and not any("test" in result["result"] for result in results)


def test_packaged_data_go_by_their_names(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(forecast.PACKAGED, "weather", lambda: waves(750, 2, name="weather"))
    command = ("--data=weather", "--models=naive", "--seeds=0", "--horizons=12")
    assert call(capsys, "run", *command, f"--output={tmp_path}")[0] == 0
    assert (tmp_path / "results" / "weather-naive-12-0.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data=traffics"], "data must be a CSV file or one of weather, traffic, got 'traffics'"),
        (["run", "--data=FILE", "--models=fem-tim"], "models must be one of"),
        (["run", "--data=FILE", "--lr=1"], "unknown option --lr"),
        (
            ["run", "--data=FILE", "--horizons=52"],
            "horizon must be one that leaves 100 validation windows",
        ),
        (["pilot", "--data=FILE", "--lrs=0"], "lrs must be a finite number above 0, got 0.0"),
        (["pilot", "--data=FILE", "--models=naive"], "models must be models that are trained"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, file, arguments, message):
    arguments = [argument.replace("FILE", str(file)) for argument in arguments]
    code, _, error = call(capsys, *arguments, f"--output={tmp_path / 'new'}")
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "new").rglob("*.json"))
