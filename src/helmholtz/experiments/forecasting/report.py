"""Tables and figures of the forecasting study."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.forecasting.data import Series
from helmholtz.experiments.forecasting.run import LOOK_BACK, RECIPES, SHOWN_STEPS, shown_windows
from helmholtz.experiments.forecasting.windows import forecast_data
from helmholtz.experiments.queue import FinishedRun, grouped, runs_of, spread, values_of

PUBLISHED: dict[str, dict[str, float]] = {
    "ETTh1": {
        "FEM, softmax": 0.419, "FEM, best": 0.414, "iTransformer": 0.454, "PatchTST": 0.413, "DLinear": 0.422,
    },
    "ETTh2": {"FEM, best": 0.339},
    "ETTm1": {"FEM, softmax": 0.341, "iTransformer": 0.373, "PatchTST": 0.346, "DLinear": 0.347},
    "ETTm2": {
        "FEM, softmax": 0.242, "FEM, best": 0.241, "iTransformer": 0.265, "PatchTST": 0.247, "DLinear": 0.252,
    },
}  # fmt: skip
"""Mean squared errors over horizons by the name of the data, as Lu & Yang 2026 report them; their look-back, horizons
and sizes are not known here."""


def summary(done: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A row per data and model: test errors by horizon, and their mean over horizons, both as a spread over seeds.

    The mean over horizons is of seeds that have all horizons of the data; None if there are none.
    """
    rows = []
    for (data, model), runs in grouped(done, "data", "model").items():
        horizons = sorted(values_of(runs_of(done, data=data), "horizon"))
        by_seed = {s: own for (s,), own in grouped(runs, "seed").items() if len(own) == len(horizons)}
        row: dict[str, Any] = {"data": data, "model": model, "seeds": list(by_seed), "horizons": horizons}
        row["parameters"] = {str(run.setting("horizon")): run.result["parameters"] for run in runs}
        row["cpu_seconds"] = round(sum(run.timing.get("cpu_seconds", 0.0) for run in runs), 1)
        for error in ("mse", "mae"):
            means = [sum(_errors(own, error)) / len(own) for own in by_seed.values()]
            row[error] = asdict(spread(means)) if means else None
            row[f"{error}_by_horizon"] = {
                str(horizon): asdict(spread(_errors(own, error)))
                for (horizon,), own in grouped(runs, "horizon").items()
            }
        rows.append(row)
    return rows


def _errors(runs: Sequence[FinishedRun], error: str) -> list[float]:
    return [run.result["test"][error] for run in runs]


def pilot_summary(done: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A row per model and learning rate of a pilot: its validation errors by data, and their mean."""
    rows = []
    for (model,), runs in grouped(done, "model").items():
        for lr in dict.fromkeys(run.run.settings["training"]["lr"] for run in runs):
            found = [run for run in runs if run.run.settings["training"]["lr"] == lr]
            errors = {
                data: statistics.fmean(run.result["validation"]["mse"] for run in own)
                for (data,), own in grouped(found, "data").items()
            }
            mean = statistics.fmean(errors.values())
            rows.append({"model": model, "lr": lr, "validation_mse": errors, "mean": mean})
    return rows


def plot_horizons(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Test error against horizon, a panel per data and a line per model; bars from the lowest to the highest seed."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    with saved_figure(file, (4.4 * len(names) + 1.5, 3.9)) as figure:
        panels = figure.subplots(1, len(names), squeeze=False)
        for axes, data in zip(panels[0], names, strict=True):
            for row in (row for row in rows if row["data"] == data):
                spreads = row["mse_by_horizon"]
                horizons = sorted(spreads, key=int)
                means = [spreads[h]["mean"] for h in horizons]
                below = [spreads[h]["mean"] - spreads[h]["low"] for h in horizons]
                above = [spreads[h]["high"] - spreads[h]["mean"] for h in horizons]
                axes.errorbar(
                    range(len(horizons)), means, (below, above), label=row["model"],
                    color=_colour(row["model"]), marker="o", markersize=3, capsize=2, linewidth=1,
                )  # fmt: skip
                axes.set_xticks(range(len(horizons)), horizons)
            axes.set_title(data)
            axes.set_xlabel("horizon")
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("mean squared error (test, standardised)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)


def plot_forecasts(done: Sequence[FinishedRun], one: Series, file: Path, *, horizon: int, seed: int) -> None:
    """The first steps of some test windows of the variate that a series shows, with the forecast of every model."""
    runs = runs_of(done, data=one.name, horizon=horizon, seed=seed)
    data = forecast_data(one, look_back=LOOK_BACK, horizon=horizon)
    chosen = shown_windows(len(data.test))
    inputs, targets = data.test.read(chosen)
    place = one.variates.index(one.shown)
    mean, scale = data.mean[place].item(), data.scale[place].item()
    past = (inputs[..., place].double() * scale + mean).tolist()
    truth = (targets[:, :SHOWN_STEPS, place].double() * scale + mean).tolist()
    with saved_figure(file, (9, 2.3 * len(chosen) + 0.6)) as figure:
        panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)
        for number, axes in enumerate(panels[:, 0]):
            axes.plot(range(-LOOK_BACK, 0), past[number], color="C7", linewidth=1)
            axes.plot(
                range(len(truth[number])), truth[number], color="black", linewidth=1.4, label="measured"
            )
            for run in runs:
                forecast = [value * scale + mean for value in run.result["forecasts"][number]]
                model = run.run.settings["model"]
                axes.plot(range(len(forecast)), forecast, color=_colour(model), linewidth=1, label=model)
            axes.axvline(-0.5, color="C7", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.3)
        panels[-1][0].set_xlabel(f"steps of {one.step}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
        figure.suptitle(
            f"{one.name}: {one.shown}, three test windows, horizon {horizon}, seed {seed}", fontsize=10
        )


def _colour(model: str) -> str:
    return f"C{list(RECIPES).index(model)}"
