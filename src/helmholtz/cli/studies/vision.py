"""``helmholtz study vision``."""

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
from helmholtz.experiments.queue import SEEDS, QueuedRun, fold_finished, run_queue, shard
from helmholtz.experiments.vision.data import PACKAGED, ImageSplits, idx_images
from helmholtz.experiments.vision.report import (
    data_names,
    pilot_summary,
    plot_confusion,
    plot_learning,
    summary,
)
from helmholtz.experiments.vision.run import LEARNING_RATES, compute_vision, vision_runs

ACTIONS = {
    "run": "Train and measure vision transformers. Finished runs are kept, an interrupted queue goes on where it was.",
    "list": LIST,
    "pilot": "Compare learning rates on validation images alone; the test images are not looked at.",
    "report": "Table and pictures of the runs that are finished.",
}


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study vision {action}", ACTIONS[action])
    if action == "pilot":
        parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates")
    parser.add_argument(
        "--data", type=str, nargs="+", default=["digits"],
        help=f"{', '.join(PACKAGED)}, or folders of IDX files named as MNIST's",
    )  # fmt: skip
    parser.add_argument("--models", type=str, nargs="+", default=list(LEARNING_RATES), help="mixers")
    seeds = [1000] if action == "pilot" else list(SEEDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="of weights and order")
    parser.add_argument("--output", type=str, default=f"results/vision/{'pilot' if action == 'pilot' else 'run'}",
                        help="folder of the results")  # fmt: skip
    if action in ("run", "pilot"):
        add_shard(parser)
        add_threads(parser)
    values = parse(parser, arguments)
    for lr in values.get("lrs", []):
        check_positive("lrs", lr)
    check_options(values, "data", "models", "seeds")
    return values


def load(names: Sequence[str]) -> list[ImageSplits]:
    """The images by name or folder; of a folder a tenth of the training images validates."""
    return [PACKAGED[name]() if name in PACKAGED else _folder(Path(name)) for name in names]


def _folder(folder: Path) -> ImageSplits:
    check(folder.is_dir(), "data", str(folder), f"a folder of IDX files or one of {', '.join(PACKAGED)}")
    return idx_images(folder, name=folder.resolve().name)


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Mean over seeds ± deviation", box=None, padding=(0, 1, 0, 0))
    for column in ("data", "mixer"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "test accuracy", "test loss", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spreads = [spread_text(row[name]) for name in ("test_accuracy", "test_loss")]
        table.add_row(row["data"], row["model"], f"{row['parameters']:,}", *spreads, str(len(row["seeds"])))
    return table


def pilot_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Validation by learning rate", box=None, padding=(0, 1, 0, 0))
    for column in ("data", "mixer", "lr", "seed", "loss", "accuracy", "best step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        found = row["validation"]
        numbers = (f"{row['lr']:g}", str(row["seed"]), f"{found['loss']:.4f}", f"{found['accuracy']:.4f}")
        table.add_row(row["data"], row["model"], *numbers, str(row["best_step"]))
    return table


def report(action: str, runs: Sequence[QueuedRun], folder: Path, console: Console) -> None:
    """Table, ``summary.json`` and, of measurements on test images, pictures."""
    done, missing = fold_finished(folder, runs)
    check(bool(done), "output", str(folder), "a folder of results; helmholtz study vision run makes them")
    rows = pilot_summary(done) if action == "pilot" else summary(done)
    console.print(pilot_table(rows) if action == "pilot" else result_table(rows))
    write_summary(folder, rows, runs, missing, console)
    if action == "report":
        for data in data_names(done):
            plot_learning(done, data, folder / f"{data}-learning.png")
            plot_confusion(done, data, folder / f"{data}-confusion.png")


def act(action: str, arguments: list[str], console: Console) -> None:
    values = options(action, arguments)
    folder, data = Path(values["output"]), load(values["data"])
    runs = vision_runs(
        data,
        values["models"],
        values["seeds"],
        measured="validation" if action == "pilot" else "test",
        lrs=values.get("lrs", (None,)),
    )
    if action == "list":
        list_runs(folder, runs, console)
    if action in ("run", "pilot"):
        torch.set_num_threads(values["threads"])
        compute = functools.partial(compute_vision, data={one.name: one for one in data})
        run_queue(shard(runs, values["shard"]), compute, folder, report=announced(console))
    if action in ("report", "pilot"):
        report(action, runs, folder, console)
