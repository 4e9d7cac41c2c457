"""The forecasting study: options, series, report."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from helmholtz.experiments.base import (
    LIST,
    Note,
    Study,
    add_learning_rates,
    add_names,
    add_seeds,
    load_data,
    make_table,
    spread_text,
)
from helmholtz.experiments.forecasting.data import PACKAGED, read_series
from helmholtz.experiments.forecasting.report import (
    PUBLISHED,
    pilot_summary,
    plot_forecasts,
    plot_horizons,
    summary,
)
from helmholtz.experiments.forecasting.run import HORIZONS, RECIPES, compute_forecast, forecast_runs
from helmholtz.experiments.queue import SEEDS, FinishedRun, QueuedRun, runs_of, values_of

TRAINED = [name for name, recipe in RECIPES.items() if recipe is not None]


class Forecasting(Study):
    name = "forecasting"
    actions = {
        "run": "Train and measure forecasters. Finished runs are kept, an interrupted queue goes on where it was.",
        "list": LIST,
        "pilot": "Compare learning rates on validation windows alone; the test windows are not looked at.",
        "report": "Tables and figures of the runs that are finished.",
    }

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        self.series = load_data(values["data"], PACKAGED, read_series, "a CSV file")

    @classmethod
    def output(cls, action: str) -> str:
        return f"results/forecast/{'pilot' if action == 'pilot' else 'run'}"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        models, horizons, seeds = list(RECIPES), list(HORIZONS), list(SEEDS)
        if action == "pilot":
            models, horizons, seeds = TRAINED, [192], [1000]
            add_learning_rates(parser)
        files = f"{', '.join(PACKAGED)}, or CSV files: a column date and numbers otherwise"
        add_names(parser, "data", list(PACKAGED), files)
        add_names(parser, "models", models)
        parser.add_argument(
            "--horizons", type=int, nargs="+", default=horizons, help="steps that are forecast"
        )
        add_seeds(parser, "of weights and order", seeds)

    def runs(self) -> list[QueuedRun]:
        return forecast_runs(
            self.series,
            self.values["models"],
            self.values["horizons"],
            self.values["seeds"],
            measured=self.measured,
            lrs=self.lrs,
        )

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        return compute_forecast(run, {one.name: one for one in self.series})

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        if self.action == "pilot":
            rows = pilot_summary(done)
            console.print(make_table("Validation MSE by learning rate", [_pilot_cells(row) for row in rows]))
        else:
            rows = summary(done)
            for data in values_of(done, "data"):
                title = f"{data}: test errors, mean over horizons (± deviation over seeds); MSE by horizon"
                console.print(make_table(title, _error_rows(rows, data)))
            self._plot(done, rows)
        self.write_summary(rows, done, missing)

    def _plot(self, done: Sequence[FinishedRun], rows: Sequence[Mapping[str, Any]]) -> None:
        plot_horizons(rows, self.folder / "horizons.png")
        for one in self.series:
            own = runs_of(done, data=one.name)
            if own:
                horizon, seed = min(values_of(own, "horizon")), min(values_of(own, "seed"))
                plot_forecasts(own, one, self.folder / f"{one.name}.png", horizon=horizon, seed=seed)


STUDY = Forecasting


def _error_rows(rows: Sequence[Mapping[str, Any]], data: str) -> list[dict[str, str]]:
    """Test errors of the models on one series, and what was published of it."""
    cells = []
    for row in (row for row in rows if row["data"] == data):
        by_horizon = {str(horizon): row["mse_by_horizon"].get(str(horizon)) for horizon in row["horizons"]}
        cells.append(
            {
                "model": row["model"],
                "MSE": spread_text(row["mse"], digits=3),
                "MAE": spread_text(row["mae"], digits=3),
                **{h: "-" if found is None else f"{found['mean']:.3f}" for h, found in by_horizon.items()},
                "seeds": str(len(row["seeds"])),
            }
        )
    published = PUBLISHED.get(data, {})
    return cells + [{"model": f"paper: {name}", "MSE": f"{mse:.3f}"} for name, mse in published.items()]


def _pilot_cells(row: Mapping[str, Any]) -> dict[str, str]:
    errors = {data: f"{error:.4f}" for data, error in row["validation_mse"].items()}
    return {"model": row["model"], "lr": f"{row['lr']:g}", **errors, "mean": f"{row['mean']:.4f}"}
