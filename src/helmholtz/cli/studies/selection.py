"""``helmholtz study selection``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check_integer
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.queues import LIST, add_threads, announced, check_options, list_runs
from helmholtz.experiments.queue import (
    SEEDS,
    FinishedRun,
    QueuedRun,
    Spread,
    fold_finished,
    run_queue,
    spread,
)
from helmholtz.experiments.records import RUNS
from helmholtz.experiments.selection.report import by_reader, of_part, plot_gaps, plot_reads
from helmholtz.experiments.selection.run import SelectionStudy, compute, queue

ACTIONS = {
    "run": "Measure the gap between a read and the channel's maximum, train layers that read a lossless cache, count "
    "patterns; then the report. Each run's result is kept, and not computed again.",
    "report": "Tables and pictures of the finished runs: attention and free energy of equal parameters.",
    "list": LIST,
}


def gap_table(runs: Sequence[FinishedRun]) -> Table:
    """Gaps under a uniform prior, means over seeds."""
    sizes = runs[0].run.settings
    title = f"Gap to the channel's maximum, {sizes['n_tokens']} tokens, {len(runs)} x {sizes['n_channels']:,} channels"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in ("read", "beta", "cap", "gap", "law", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for rows in zip(*(run.result["rows"] for run in runs), strict=True):
        first = rows[0]
        table.add_row(
            first["read"],
            f"{first['beta']:g}" if first["beta"] else "",
            "" if first["cap"] is None else f"{first['cap']:g}",
            _number(spread([row["gap"] for row in rows])),
            f"{first['law']:.4f}",
            "" if first["bound"] is None else f"{first['bound']:.4f}",
        )
    return table


def learned_table(title: str, readers: dict[str, list[FinishedRun]]) -> Table:
    """Trained layers, means over seeds, the error with its sample deviation."""
    sizes = {runs[0].result["parameters"] for runs in readers.values()}
    title += f": {', '.join(f'{size:,}' for size in sorted(sizes))} parameters each"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in ("layer", "rms error", "explained", "own token", "sharpness"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for label, runs in readers.items():
        means = {
            name: spread([run.result[name] for run in runs])
            for name in ("rms_error", "explained", "selected", "sharpness")
        }
        table.add_row(
            label,
            _number(means["rms_error"]),
            f"{means['explained'].mean:.3f}",
            f"{means['selected'].mean:.1%}",
            f"{means['sharpness'].mean:.2f}",
        )
    return table


def pattern_table(runs: Sequence[FinishedRun]) -> Table:
    """Distinct assignments found, by seed, and how many there are."""
    table = Table(
        title="Patterns reached by one layer, per seed, of those there are", box=None, padding=(0, 1, 0, 0)
    )
    for column in ("tokens", "heads", "channels", "attention", "t^H", "free energy", "t^D"):
        table.add_column(column, justify="right", no_wrap=True)
    for rows in zip(*(run.result["rows"] for run in runs), strict=True):
        first = rows[0]
        table.add_row(
            *(str(first[name]) for name in ("n_tokens", "n_heads", "n_channels")),
            ", ".join(str(row["attention"]) for row in rows),
            str(first["by_heads"]),
            ", ".join(str(row["free_energy"]) for row in rows),
            str(first["by_channels"]),
        )
    return table


def _number(found: Spread) -> str:
    return f"{found.mean:.4f}" + ("" if found.deviation is None else f" ± {found.deviation:.4f}")


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study selection {action}", ACTIONS[action])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of caches and weights")
    parser.add_argument(
        "--steps", type=int, default=SelectionStudy().steps, help="optimizer steps of a layer"
    )
    parser.add_argument("--output", type=str, default="results/selection", help="folder of the results")
    if action == "run":
        add_threads(parser)
    values = parse(parser, arguments)
    check_integer("steps", values["steps"])
    check_options(values, "seeds")
    for seed in values["seeds"]:
        check_integer("seeds", seed, minimum=0)
    return values


def report(runs: Sequence[QueuedRun], folder: Path, console: Console) -> None:
    """Tables and pictures, if all runs are there."""
    done, missing = fold_finished(folder, runs)
    if missing:
        console.print(f"{len(missing)} runs are missing; tables and pictures are made when all are done")
        return
    console.print(gap_table(of_part(done, "gaps")))
    console.print(learned_table("Every channel's maximum", by_reader(done, "maximum")))
    console.print(learned_table("A token named for every channel", by_reader(done, "named")))
    console.print(pattern_table(of_part(done, "patterns")))
    plot_gaps(done, folder / "gaps.png")
    plot_reads(done, folder / "reads.png")
    console.print(f"wrote {folder / RUNS}, {folder / 'gaps.png'} and {folder / 'reads.png'}", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    values = options(action, arguments)
    runs, folder = queue(SelectionStudy(steps=values["steps"]), values["seeds"]), Path(values["output"])
    if action == "list":
        list_runs(folder, runs, console)
        return
    if action == "run":
        torch.set_num_threads(values["threads"])
        run_queue(runs, compute, folder, report=announced(console))
    report(runs, folder, console)
