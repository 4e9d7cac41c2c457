"""``helmholtz study forecasting``."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check, check_positive
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.queues import (
    LIST,
    add_shard,
    add_threads,
    announced,
    check_options,
    list_runs,
    spread_text,
    write_summary,
)
from helmholtz.experiments.forecasting.data import PACKAGED, Series, read_series
from helmholtz.experiments.forecasting.report import (
    PUBLISHED,
    of,
    pilot_summary,
    plot_forecasts,
    plot_horizons,
    summary,
    values_of,
)
from helmholtz.experiments.forecasting.run import HORIZONS, RECIPES, compute_forecast, forecast_runs
from helmholtz.experiments.queue import SEEDS, QueuedRun, fold_finished, run_queue, shard

ACTIONS = {
    "run": "Train and measure forecasters. Finished runs are kept, an interrupted queue goes on where it was.",
    "list": LIST,
    "pilot": "Compare learning rates on validation windows alone; the test windows are not looked at.",
    "report": "Tables and pictures of the runs that are finished.",
}
TRAINED = [name for name, recipe in RECIPES.items() if recipe is not None]


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study forecasting {action}", ACTIONS[action])
    models, horizons, seeds = (list(RECIPES), list(HORIZONS), list(SEEDS))
    if action == "pilot":
        models, horizons, seeds = TRAINED, [192], [1000]
        parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates")
    parser.add_argument(
        "--data", type=str, nargs="+", default=list(PACKAGED),
        help=f"{', '.join(PACKAGED)}, or CSV files: a column date and numbers otherwise",
    )  # fmt: skip
    parser.add_argument("--models", type=str, nargs="+", default=models, help=f"of {', '.join(models)}")
    parser.add_argument("--horizons", type=int, nargs="+", default=horizons, help="steps that are forecast")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="of weights and order")
    parser.add_argument("--output", type=str, default=f"results/forecast/{'pilot' if action == 'pilot' else 'run'}",
                        help="folder of the results")  # fmt: skip
    if action in ("run", "pilot"):
        add_shard(parser)
        add_threads(parser)
    values = parse(parser, arguments)
    for lr in values.get("lrs", []):
        check_positive("lrs", lr)
    check_options(values, "data", "models", "horizons", "seeds")
    return values


def load(names: Sequence[str]) -> list[Series]:
    """The series by the names of packaged ones or of files. Raises: ValueError for a name that is neither."""
    found = []
    for name in names:
        if name in PACKAGED:
            found.append(PACKAGED[name]())
        else:
            check(Path(name).is_file(), "data", name, f"a CSV file or one of {', '.join(PACKAGED)}")
            found.append(read_series(Path(name)))
    return found


def runs_of(action: str, values: dict[str, Any], series: Sequence[Series]) -> list[QueuedRun]:
    return forecast_runs(
        series,
        values["models"],
        values["horizons"],
        values["seeds"],
        measured="validation" if action == "pilot" else "test",
        lrs=values.get("lrs", (None,)),
    )


def error_table(rows: Sequence[dict[str, Any]], data: str) -> Table:
    """Test errors of the models on one series, and what was published of it."""
    rows = [row for row in rows if row["data"] == data]
    horizons = rows[0]["horizons"]
    title = f"{data}: test errors, mean over horizons (± deviation over seeds); MSE by horizon"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("MSE", "MAE", *map(str, horizons), "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        by_horizon = [row["mse_by_horizon"].get(str(horizon)) for horizon in horizons]
        cells = [spread_text(found, digits=3) for found in (row["mse"], row["mae"])]
        means = ["-" if found is None else f"{found['mean']:.3f}" for found in by_horizon]
        table.add_row(row["model"], *cells, *means, str(len(row["seeds"])))
    for name, mse in PUBLISHED.get(data, {}).items():
        table.add_row(f"paper: {name}", f"{mse:.3f}")
    return table


def pilot_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Validation MSE by learning rate", box=None, padding=(0, 1, 0, 0))
    for column in ("model", "lr", *rows[0]["validation_mse"], "mean"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        errors = [f"{value:.4f}" for value in (*row["validation_mse"].values(), row["mean"])]
        table.add_row(row["model"], f"{row['lr']:g}", *errors)
    return table


def report_pilot(runs: Sequence[QueuedRun], folder: Path, console: Console) -> None:
    done, missing = fold_finished(folder, runs)
    if done:
        rows = pilot_summary(done)
        console.print(pilot_table(rows))
        write_summary(folder, rows, runs, missing, console)


def report_test(runs: Sequence[QueuedRun], series: Sequence[Series], folder: Path, console: Console) -> None:
    done, missing = fold_finished(folder, runs)
    check(
        bool(done), "output", str(folder), "a folder of results; helmholtz study forecasting run makes them"
    )
    rows = summary(done)
    for data in values_of(done, "data"):
        console.print(error_table(rows, data))
    write_summary(folder, rows, runs, missing, console)
    plot_horizons(rows, folder / "horizons.png")
    for one in series:
        own = of(done, data=one.name)
        if own:
            horizon, seed = min(values_of(own, "horizon")), min(values_of(own, "seed"))
            plot_forecasts(own, one, folder / f"{one.name}.png", horizon=horizon, seed=seed)
    console.print(f"wrote pictures into {folder}", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    values = options(action, arguments)
    folder = Path(values["output"])
    series = load(values["data"])
    runs = runs_of(action, values, series)
    if action == "list":
        list_runs(folder, runs, console)
    if action in ("run", "pilot"):
        torch.set_num_threads(values["threads"])
        compute = functools.partial(compute_forecast, series={one.name: one for one in series})
        run_queue(shard(runs, values["shard"]), compute, folder, report=announced(console))
    if action == "pilot":
        report_pilot(runs, folder, console)
    if action == "report":
        report_test(runs, series, folder, console)
