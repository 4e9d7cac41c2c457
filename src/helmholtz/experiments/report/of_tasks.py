"""Sections of the benchmarks that are queues: MAD, forecasting, vision."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.forecasting import data as series
from helmholtz.experiments.forecasting.run import HORIZONS, RECIPES
from helmholtz.experiments.mad.models import MODELS
from helmholtz.experiments.mad.run import PROFILES
from helmholtz.experiments.queue import SEEDS
from helmholtz.experiments.report.charts import Curve, dot_chart, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, grouped, label, number, ordered, read_node
from helmholtz.experiments.report.section import (
    Figure,
    Section,
    Table,
    absent,
    incomplete,
    locate_queue,
    queue_nodes,
    queue_provenance,
)
from helmholtz.experiments.vision import data as images
from helmholtz.experiments.vision.run import LEARNING_RATES

MAD = "MAD: six synthetic tasks"
MAD_ASKED = (
    "Which mixers remember, copy and compress? The baseline setting of every task of the MAD benchmark, one learning "
    "rate per task that a pilot chose on attention alone."
)
MAD_COMMAND = "helmholtz study mad run --profile quick --output docs/experiments/mad"
FORECAST = "Forecasting"
FORECAST_ASKED = (
    "Time series of many variates, look-back 96: attention and free energy against two simple baselines."
)
FORECAST_COMMAND = "helmholtz study forecasting run"
VISION = "Vision"
VISION_ASKED = "A small vision transformer whose attention is plain or free energy, both ways in time."
VISION_COMMAND = "helmholtz study vision run"


def mad(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "mad/quick")
    if folder is None:
        return absent("mad", MAD, MAD_ASKED, MAD_COMMAND, "mad/quick/results")
    nodes = queue_nodes(folder)
    models = by_model(nodes)
    by_tasks = {
        model: grouped(runs, lambda node: node["settings"]["task"].value) for model, runs in models.items()
    }
    profile = PROFILES["quick"]
    seen = {task for by_task in by_tasks.values() for task in by_task}
    tasks = [task for task in profile.settings if task in seen]
    lines = [
        (label(model.replace("_", " ")), *(_score(by_task.get(task, [])) for task in tasks))
        for model, by_task in by_tasks.items()
    ]
    wanted = dict.fromkeys(profile.settings, len(profile.models) * len(profile.seeds))
    missing = incomplete((node["settings"]["task"].value for node in nodes), wanted)
    table = Table(
        "Score, mean and deviation over seeds", ("model", *(t.replace("-", " ") for t in tasks)), tuple(lines)
    )
    figures = tuple(_task_figure(task, nodes) for task in tasks if any(_scored(node, task) for node in nodes))
    provenance = queue_provenance(nodes)
    tables = (table, *_beside_published(folder / "report.json", list(profile.settings)))
    return Section("mad", MAD, MAD_ASKED, MAD_COMMAND, tables, figures, provenance, missing)


def _beside_published(file: Path, tasks: Sequence[str]) -> tuple[Table, ...]:
    """What ``helmholtz study mad report`` has written of the papers, if it has been called."""
    if not file.exists():
        return ()
    report = read_node(file)
    published = [
        (
            label(f"{row['label'].value}, {row['source'].value}"),
            *(number(score, ".1f") for score in row["tasks"]),
        )
        for row in report["published"]
    ]
    differences = [
        (
            label(f"{_spoken(pair['first'])} to {_spoken(pair['second'])}, {_spoken(pair['task'])}"),
            number(pair["published"], "+.1f"),
            number(pair["ours"], "+.1f"),
            label(pair["verdict"].value),
        )
        for pair in report["comparisons"]
    ]
    columns = ("model", *(task.replace("-", " ") for task in tasks))
    titles = ("from, to, task", "published", "ours", "verdict")
    return (
        Table("Published, per cent; theirs are of harder settings too", columns, tuple(published)),
        Table("Differences that a paper reports too, points", titles, tuple(differences)),
    )


def _spoken(node: Node) -> str:
    return str(node.value).replace("_", " ").replace("-", " ")


def by_model(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """In the order of the studies' own tables."""
    groups = grouped(nodes, lambda node: node["settings"]["model"].value)
    return ordered(groups, (*MODELS, *RECIPES))


def _score(runs: Sequence[Node]) -> Cell:
    return number([run["result"]["score"] for run in runs], ".1%")


def _task_figure(task: str, nodes: Sequence[Node]) -> Figure:
    rows = [
        (model.replace("_", " "), scores)
        for model, runs in by_model(nodes).items()
        if (scores := [r["result"]["score"].value for r in runs if _scored(r, task)])
    ]
    return Figure(task.replace("-", " "), dot_chart(rows, x="score"))


def _scored(run: Node, task: str) -> bool:
    return bool(run["settings"]["task"].value == task and run["result"]["score"].value is not None)


def forecasting(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "forecast/run", "forecasting/run", "forecast", "forecasting")
    if folder is None:
        return absent("forecasting", FORECAST, FORECAST_ASKED, FORECAST_COMMAND, "forecast/run/results")
    nodes = [node for node in queue_nodes(folder) if "test" in node["result"].value]
    wanted = dict.fromkeys((*series.PACKAGED, *_data_names(nodes)), len(RECIPES) * len(HORIZONS) * len(SEEDS))
    tables, figures = [], []
    for name, runs in grouped(nodes, _data_name).items():
        horizons = sorted({run["settings"]["horizon"].value for run in runs})
        models = by_model(runs)
        tables += [_error_table(name, error, models, horizons) for error in ("mse", "mae")]
        curves = [
            Curve(model, horizons, [_mean_error(own, horizon) for horizon in horizons])
            for model, own in models.items()
            if {run["settings"]["horizon"].value for run in own} == set(horizons)
        ]
        figures.append(
            Figure(f"{name}: error by horizon, mean of seeds.", line_chart(curves, x="horizon", y="test MSE"))
        )
    provenance = queue_provenance(nodes)
    missing = incomplete(_data_names(nodes), wanted)
    return Section(
        "forecasting", FORECAST, FORECAST_ASKED, FORECAST_COMMAND, tuple(tables), tuple(figures), provenance, missing
    )  # fmt: skip


def _data_name(node: Node) -> str:
    return str(node["settings"]["data"]["name"].value)


def _data_names(nodes: Sequence[Node]) -> list[str]:
    return [_data_name(node) for node in nodes]


def _error_table(name: str, error: str, models: dict[str, list[Node]], horizons: Sequence[int]) -> Table:
    lines = []
    for model, runs in models.items():
        by_horizon = grouped(runs, lambda run: run["settings"]["horizon"].value)
        cells = [
            number([run["result"]["test"][error] for run in by_horizon.get(h, [])], ".3f") for h in horizons
        ]
        lines.append((label(model), *cells))
    columns = ("model", *(f"horizon {horizon}" for horizon in horizons))
    return Table(f"{name}: test {error.upper()} of the standardised series", columns, tuple(lines))


def _mean_error(runs: Sequence[Node], horizon: int) -> float:
    errors = [
        run["result"]["test"]["mse"].value for run in runs if run["settings"]["horizon"].value == horizon
    ]
    return float(sum(errors) / len(errors))


def vision(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "vision/run", "vision")
    if folder is None:
        return absent("vision", VISION, VISION_ASKED, VISION_COMMAND, "vision/run/results")
    nodes = [node for node in queue_nodes(folder) if "test" in node["result"].value]
    wanted = dict.fromkeys((*images.PACKAGED, *_data_names(nodes)), len(LEARNING_RATES) * len(SEEDS))
    tables, figures = [], []
    for name, runs in grouped(nodes, _data_name).items():
        models = by_model(runs)
        lines = [
            (
                label(model),
                number(own[0]["result"]["parameters"], ",d"),
                number([run["result"]["test"]["accuracy"] for run in own], ".2%"),
                number([run["result"]["test"]["loss"] for run in own], ".4f"),
            )
            for model, own in models.items()
        ]
        tables.append(Table(name, ("mixer", "parameters", "test accuracy", "test loss, nats"), tuple(lines)))
        rows = [
            (model, [run["result"]["test"]["accuracy"].value for run in own]) for model, own in models.items()
        ]
        figures.append(Figure(f"{name}: a mark per seed.", dot_chart(rows, x="test accuracy")))
    provenance = queue_provenance(nodes)
    missing = incomplete(_data_names(nodes), wanted)
    return Section(
        "vision", VISION, VISION_ASKED, VISION_COMMAND, tuple(tables), tuple(figures), provenance, missing
    )
