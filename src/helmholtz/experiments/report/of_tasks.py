"""Sections of the benchmarks that are queues: MAD, forecasting, vision."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from helmholtz.experiments.forecasting import data as series
from helmholtz.experiments.forecasting.run import HORIZONS, RECIPES
from helmholtz.experiments.mad.models import MODELS
from helmholtz.experiments.mad.run import PROFILES
from helmholtz.experiments.queue import SEEDS
from helmholtz.experiments.report import parts
from helmholtz.experiments.report.charts import Curve, line_chart
from helmholtz.experiments.report.nodes import Node, by, grouped, label, mean, ordered, read_node
from helmholtz.experiments.vision import data as images
from helmholtz.experiments.vision.run import LEARNING_RATES

DATA = by("settings/data/name")
IMAGES = {
    "parameters": parts.column("result/parameters", ",d", only=0),
    "test accuracy": parts.column("result/test/accuracy", ".2%"),
    "test loss, nats": parts.column("result/test/loss", ".4f"),
}


@parts.section(
    "MAD: six synthetic tasks",
    "Which mixers remember, copy and compress? The baseline setting of every task of the MAD benchmark, a learning "
    "rate per task and model that a pilot chose.",
    "helmholtz study mad run --profile quick --output docs/experiments/mad",
    "mad/quick",
    find=parts.locate_queue,
)
def mad(folder: Path) -> parts.Found:
    nodes, profile = parts.queue_nodes(folder), PROFILES["quick"]
    by_task = grouped(nodes, by("settings/task"))
    tasks = [task for task in profile.settings if task in by_task]
    columns = {
        _spoken(task): parts.column("result/score", ".1%", where=("settings/task", task)) for task in tasks
    }
    models = [(_spoken(model), runs) for model, runs in by_model(nodes).items()]
    table = parts.table("Score, mean and deviation over seeds", "model", models, columns)
    figures = []
    for task in tasks:
        if scored := [run for run in by_task[task] if run.at("result/score").value is not None]:
            rows = [(model.replace("_", " "), same) for model, same in by_model(scored).items()]
            figures.append(parts.dots(_spoken(task), rows, "result/score", x="score"))
    wanted = dict.fromkeys(profile.settings, len(profile.models) * len(profile.seeds))
    return parts.Found(
        [table, *_beside_published(folder / "report.json", list(profile.settings))],
        figures,
        parts.queue_provenance(nodes),
        parts.incomplete((node.at("settings/task").value for node in nodes), wanted),
    )


def _beside_published(file: Path, tasks: Sequence[str]) -> tuple[parts.Table, ...]:
    """What ``helmholtz study mad report`` has written of the papers, if it has been called."""
    if not file.exists():
        return ()
    report = read_node(file)
    published = [
        (f"{row['label'].value}, {row['source'].value}", [*row["tasks"]]) for row in report["published"]
    ]
    scores = {_spoken(task): parts.column("", ".1f", only=place) for place, task in enumerate(tasks)}
    pairs = [
        ("{} to {}, {}".format(*(_spoken(pair[name].value) for name in ("first", "second", "task"))), [pair])
        for pair in report["comparisons"]
    ]
    columns: dict[str, parts.Column] = {
        "published": parts.column("published", "+.1f"),
        "ours": parts.column("ours", "+.1f"),
        "verdict": lambda pair: label(pair[0]["verdict"].value),
    }
    return (
        parts.table("Published, per cent; theirs are of harder settings too", "model", published, scores),
        parts.table("Differences that a paper reports too, points", "from, to, task", pairs, columns),
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def by_model(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """In the order of the studies' own tables."""
    return ordered(grouped(nodes, by("settings/model")), (*MODELS, *RECIPES))


def _tested(folders: Sequence[Path], *paths: str) -> list[Node] | None:
    """The runs of a queue that were tested; None if there is no queue."""
    runs = parts.run_nodes(folders, *paths)
    return None if runs is None else [run for run in runs if "test" in run["result"].value]


@parts.section(
    "Forecasting",
    "Time series of many variates, look-back 96: attention and free energy against two simple baselines.",
    "helmholtz study forecasting run",
    *("forecast/run", "forecasting/run", "forecast", "forecasting"),
    find=_tested,
)
def forecasting(nodes: Sequence[Node]) -> parts.Found:
    tables, figures = [], []
    for name, runs in grouped(nodes, DATA).items():
        horizons, models = sorted(grouped(runs, by("settings/horizon"))), by_model(runs)
        for error in ("mse", "mae"):
            columns = {
                f"horizon {h}": parts.column(f"result/test/{error}", ".3f", where=("settings/horizon", h))
                for h in horizons
            }
            caption = f"{name}: test {error.upper()} of the standardised series"
            tables.append(parts.table(caption, "model", models.items(), columns))
        curves = []
        for model, own in models.items():
            by_horizon = grouped(own, by("settings/horizon"))
            if set(by_horizon) == set(horizons):
                errors = [mean(by_horizon[horizon], "result/test/mse") for horizon in horizons]
                curves.append(Curve(model, horizons, errors))
        chart = line_chart(curves, x="horizon", y="test MSE")
        figures.append(parts.Figure(f"{name}: error by horizon, mean of seeds.", chart))
    missing = _missing(nodes, series.PACKAGED, len(RECIPES) * len(HORIZONS) * len(SEEDS))
    return parts.Found(tables, figures, parts.queue_provenance(nodes), missing)


def _missing(nodes: Sequence[Node], wanted: Iterable[str], n_runs: int) -> tuple[str, ...]:
    """What is missing of ``n_runs`` on each of the wanted data sets, and of those that there are runs on."""
    found = [DATA(node) for node in nodes]
    return parts.incomplete(found, dict.fromkeys((*wanted, *found), n_runs))


@parts.section(
    "Vision",
    "A small vision transformer whose attention is plain or free energy, both ways in time.",
    "helmholtz study vision run",
    *("vision/run", "vision"),
    find=_tested,
)
def vision(nodes: Sequence[Node]) -> parts.Found:
    models = {name: by_model(runs).items() for name, runs in grouped(nodes, DATA).items()}
    accuracy = "result/test/accuracy"
    return parts.Found(
        [parts.table(name, "mixer", rows, IMAGES) for name, rows in models.items()],
        [
            parts.dots(f"{name}: a mark per seed.", rows, accuracy, x="test accuracy")
            for name, rows in models.items()
        ],
        parts.queue_provenance(nodes),
        _missing(nodes, images.PACKAGED, len(LEARNING_RATES) * len(SEEDS)),
    )
