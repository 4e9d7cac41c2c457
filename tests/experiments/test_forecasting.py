"""Queues of forecasters: bytes that do not hang on interruptions, errors by their formula, a test set left alone."""

import functools
import json
from dataclasses import replace

import pytest
import torch

from helmholtz.experiments.forecasting import run as forecasting
from helmholtz.experiments.forecasting.models import SeasonalNaive
from helmholtz.experiments.forecasting.report import pilot_summary, summary
from helmholtz.experiments.forecasting.run import (
    LOOK_BACK,
    RECIPES,
    Recipe,
    compute_forecast,
    errors,
    forecast_runs,
    shown_windows,
)
from helmholtz.experiments.forecasting.windows import Windows, forecast_data
from helmholtz.experiments.queue import FinishedRun, run_queue, split_finished
from series_cases import shorten, waves
from study_cases import check_resumption

WAVES = waves(750, 2)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten(monkeypatch)


def runs(**options):
    return forecast_runs([WAVES], list(RECIPES), [24], [0], **options)


compute = functools.partial(compute_forecast, series={"waves": WAVES})


def test_an_interrupted_queue_leaves_the_bytes_of_one_that_was_not(tmp_path):
    assert len(check_resumption(tmp_path, runs(), compute)) == len(RECIPES)


def test_a_result_holds_the_settings_it_hangs_on_and_no_path(tmp_path):
    run = runs()[3]
    assert run.name == "waves-fem-time-24-0"
    assert run.settings["data"] == {
        "name": "waves", "sha256": WAVES.sha256, "rows": 750, "variates": ["v0", "v1"], "filled": 0,
    }  # fmt: skip
    assert (run.settings["measured"], run.settings["training"]["steps"]) == ("test", 4)
    assert run.settings["sizes"]["axis"] == "time"
    result = compute(run)
    assert [point[0] for point in result["curve"]] == [2, 4]
    assert result["best_step"] in (2, 4) and result["parameters"] > 100_000
    assert result["test"]["windows"] == 150 - 24 + 1
    assert [len(forecast) for forecast in result["forecasts"]] == [24] * 3
    json.dumps(result, allow_nan=False)


def test_a_pilot_leaves_the_test_windows_alone(monkeypatch):
    read = []
    original = Windows.read
    monkeypatch.setattr(Windows, "read", lambda self, i: read.append(self) or original(self, i))
    queue = forecast_runs([WAVES], ["dlinear"], [24], [7], measured="validation", lrs=[1e-3, 1e-1])
    assert [run.name for run in queue] == ["waves-dlinear-24-7-lr0.001", "waves-dlinear-24-7-lr0.1"]
    results = [compute(run) for run in queue]
    test = forecast_data(WAVES, look_back=LOOK_BACK, horizon=24).test.values
    assert read and not any(torch.equal(windows.values, test) for windows in read)
    assert all("test" not in result and "forecasts" not in result for result in results)
    assert results[0]["validation"] != results[1]["validation"]
    rows = pilot_summary([FinishedRun(run, result, {}) for run, result in zip(queue, results, strict=True)])
    assert [(row["model"], row["lr"]) for row in rows] == [("dlinear", 1e-3), ("dlinear", 1e-1)]
    assert rows[0]["mean"] == rows[0]["validation_mse"]["waves"] == results[0]["validation"]["mse"]


def test_errors_are_means_over_windows_steps_and_variates(monkeypatch):
    monkeypatch.setattr(forecasting, "BATCH_SIZE", 7)
    windows = forecast_data(WAVES, look_back=LOOK_BACK, horizon=30).test
    found = errors(SeasonalNaive(30), windows)
    inputs, targets = windows.read(torch.arange(len(windows)))
    difference = inputs[:, [LOOK_BACK - 24 + h % 24 for h in range(30)]] - targets
    assert found["windows"] == len(windows) == 121
    assert found["mse"] == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert found["mae"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    result = compute(forecast_runs([WAVES], ["naive"], [30], [0])[0])
    assert result["test"] == found
    validation = forecast_data(WAVES, look_back=LOOK_BACK, horizon=30).validation
    assert result["validation"] == errors(SeasonalNaive(30), validation, stride=4)
    sparse = errors(SeasonalNaive(30), windows, stride=4)
    assert sparse["windows"] == 31
    assert sparse["mse"] == pytest.approx(difference[::4].square().mean().item(), rel=1e-5)


def test_the_models_of_a_pair_differ_in_their_mixer_alone():
    by_name = {run.settings["model"]: run.settings for run in runs()}
    for axis in ("variates", "time"):
        attention, fem = by_name[f"attention-{axis}"], by_name[f"fem-{axis}"]
        assert attention["sizes"] | {"mixer": "fem"} == fem["sizes"]
        assert attention["training"] | {"lr": 0} == fem["training"] | {"lr": 0}
    assert by_name["naive"]["training"] is by_name["naive"]["sizes"] is None


def test_seeds_change_what_is_trained_and_not_what_is_not():
    one, other = (
        {r.settings["model"]: compute(r) for r in forecast_runs([WAVES], ["dlinear", "naive"], [24], [seed])}
        for seed in (0, 1)
    )
    assert one["naive"] == other["naive"]
    assert one["dlinear"] != other["dlinear"]


def finished(model, horizon, seed, mse):
    run = next(r for r in forecast_runs([WAVES], [model], [horizon], [seed]))
    return FinishedRun(run, {"parameters": 5, "test": {"mse": mse, "mae": mse / 2}}, {"cpu_seconds": 1.5})


def test_the_summary_averages_over_horizons_and_then_over_seeds():
    done = [
        finished("naive", horizon, seed, horizon / 10 + seed) for seed in (0, 1, 2) for horizon in (12, 24)
    ]
    (row,) = summary(done)
    assert row["mse"] == pytest.approx({"mean": 2.8, "low": 1.8, "high": 3.8, "n": 3, "deviation": 1.0})
    assert row["mae"]["mean"] == pytest.approx(1.4)
    assert row["mse_by_horizon"]["24"]["mean"] == pytest.approx(3.4)
    assert (row["seeds"], row["cpu_seconds"]) == ([0, 1, 2], 9.0)
    (row,) = summary(done[:-1])
    assert (row["seeds"], row["mse"]["n"]) == ([0, 1], 2), (
        "a seed without all horizons is no part of the mean"
    )
    assert row["mse_by_horizon"]["12"]["n"] == 3
    (row,) = summary([done[0], finished("naive", 24, 1, 2.0)])
    assert row["mse"] is None


def test_shown_windows_are_spread_evenly():
    assert shown_windows(101).tolist() == [25, 50, 75]


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="models must be one of .*'fem-tim'; did you mean 'fem-time'"):
        forecast_runs([WAVES], ["fem-tim"], [24], [0])
    with pytest.raises(ValueError, match="data must be series whose names differ"):
        forecast_runs([WAVES, WAVES], ["naive"], [24], [0])
    with pytest.raises(ValueError, match="models must be models that are trained"):
        forecast_runs([WAVES], ["naive"], [24], [0], lrs=[1e-3])
    with pytest.raises(ValueError, match="seeds must be an integer of at least 0"):
        forecast_runs([WAVES], ["naive"], [24], [-1])
    with pytest.raises(ValueError, match="horizons must be an integer of at least 1"):
        forecast_runs([WAVES], ["naive"], [0], [1])


def test_other_data_of_the_same_name_are_refused(tmp_path):
    run_queue(forecast_runs([WAVES], ["naive"], [24], [0]), compute, tmp_path)
    with pytest.raises(ValueError, match=r"result of other settings: settings\.data\.(sha256|rows)"):
        split_finished(tmp_path, forecast_runs([waves(751, 2)], ["naive"], [24], [0]))


def test_training_helps():
    """A linear model of daily waves under a tenth of noise; the floor is that of the noise, standardised."""
    recipe = Recipe(lr=1e-2, steps=300, eval_every=50)
    run = forecast_runs([WAVES], ["dlinear"], [24], [0])[0]
    settings = dict(run.settings) | {"training": {**run.settings["training"], "steps": 300, "eval_every": 50,
                                                  "lr": recipe.lr, "batch_size": 32}}  # fmt: skip
    found = compute_forecast(replace(run, settings=settings), {"waves": WAVES})
    naive = compute(forecast_runs([WAVES], ["naive"], [24], [0])[0])
    assert found["test"]["mse"] < 0.8 * naive["test"]["mse"]
    assert found["curve"][-1][1] < found["curve"][0][1]
