"""The study of channel-wise selection: options and tables."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from helmholtz.experiments.base import LIST, Note, Study, add_seeds, make_table, spread_text
from helmholtz.experiments.queue import FinishedRun, QueuedRun, runs_of, spread
from helmholtz.experiments.selection.report import by_reader, plot_gaps, plot_reads
from helmholtz.experiments.selection.run import SelectionStudy, compute, queue


class Selection(Study):
    name = "selection"
    actions = {
        "run": "Measure the gap between a read and the channel's maximum, train layers that read a lossless cache, "
        "count patterns; then the report. Each run's result is kept, and not computed again.",
        "report": "Tables and figures of the finished runs: attention and free energy of equal parameters.",
        "list": LIST,
    }
    reported = ("run", "report")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        add_seeds(parser, "of caches and weights")
        steps = SelectionStudy().steps
        parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a layer")

    def runs(self) -> list[QueuedRun]:
        return queue(SelectionStudy(steps=self.values["steps"]), self.values["seeds"])

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        return compute(run)

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        if missing:
            console.print("tables and figures are made when all runs are done")
            return
        console.print(gap_table(runs_of(done, part="gaps")))
        console.print(learned_table("Every channel's maximum", by_reader(done, "maximum")))
        console.print(learned_table("A token named for every channel", by_reader(done, "named")))
        console.print(pattern_table(runs_of(done, part="patterns")))
        plot_gaps(done, self.folder / "gaps.png")
        plot_reads(done, self.folder / "reads.png")
        console.print(f"wrote gaps.png and reads.png into {self.folder}", markup=False)


STUDY = Selection


def gap_table(runs: Sequence[FinishedRun]) -> Table:
    """Gaps under a uniform prior, means over seeds."""
    sizes = runs[0].run.settings
    title = f"Gap to the channel's maximum, {sizes['n_tokens']} tokens, {len(runs)} x {sizes['n_channels']:,} channels"
    return make_table(title, [_gap_cells(rows) for rows in _by_seed(runs)])


def _by_seed(runs: Sequence[FinishedRun]) -> list[tuple[Mapping[str, Any], ...]]:
    """The rows of results, each with those that differ from it in the seed."""
    return list(zip(*(run.result["rows"] for run in runs), strict=True))


def _gap_cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    first = rows[0]
    return {
        "read": first["read"],
        "beta": f"{first['beta']:g}" if first["beta"] else "",
        "cap": "" if first["cap"] is None else f"{first['cap']:g}",
        "gap": spread_text(spread([row["gap"] for row in rows])),
        "law": f"{first['law']:.4f}",
        "bound": "" if first["bound"] is None else f"{first['bound']:.4f}",
    }


def learned_table(title: str, readers: Mapping[str, Sequence[FinishedRun]]) -> Table:
    """Trained layers, means over seeds, the error with its sample deviation."""
    sizes = {runs[0].result["parameters"] for runs in readers.values()}
    title += f": {', '.join(f'{size:,}' for size in sorted(sizes))} parameters each"
    return make_table(title, [_learned_cells(label, runs) for label, runs in readers.items()])


def _learned_cells(label: str, runs: Sequence[FinishedRun]) -> dict[str, str]:
    found = {
        name: spread([run.result[name] for run in runs])
        for name in ("rms_error", "explained", "selected", "sharpness")
    }
    return {
        "layer": label,
        "rms error": spread_text(found["rms_error"]),
        "explained": f"{found['explained'].mean:.3f}",
        "own token": f"{found['selected'].mean:.1%}",
        "sharpness": f"{found['sharpness'].mean:.2f}",
    }


def pattern_table(runs: Sequence[FinishedRun]) -> Table:
    """Distinct assignments found, by seed, and how many there are."""
    rows = [_pattern_cells(rows) for rows in _by_seed(runs)]
    return make_table("Patterns reached by one layer, per seed, of those there are", rows, left=0)


def _pattern_cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    first = rows[0]
    return {
        "tokens": str(first["n_tokens"]),
        "heads": str(first["n_heads"]),
        "channels": str(first["n_channels"]),
        "attention": ", ".join(str(row["attention"]) for row in rows),
        "t^H": str(first["by_heads"]),
        "free energy": ", ".join(str(row["free_energy"]) for row in rows),
        "t^D": str(first["by_channels"]),
    }
