"""What a study is: options, a queue of runs, how one of them is computed, and a report of those that are finished.

``helmholtz study NAME`` drives every study alike (``cli/study.py``). A new one is a folder ``experiments/NAME`` whose
``study.py`` names its subclass ``STUDY``, and a line in the list ``STUDIES`` of that module.
"""

import abc
import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from helmholtz._checks import check, check_choice, check_integer, check_positive
from helmholtz._files import write_json
from helmholtz.experiments.queue import SEEDS, FinishedRun, QueuedRun, Spread
from helmholtz.layers.init import initializer_range

T = TypeVar("T")

STARTS = {"0.02": 0.02, "fan_in": None}
"""How weights start, as ``layers.init.initializer_range`` takes it. Committed results are of 0.02, the default of the
library when they were computed; its own is by fan-in now."""
COMPUTING = ("run", "pilot")
"""Actions that compute runs; all others only read results."""
LIST = "What is done and what is missing."

Note = Callable[[int, int], None]
"""Told how far a run is: the steps made, and the steps in all."""


class Study(abc.ABC):
    """A study with the values of its options.

    Args:
        values: what the parser gave, ``output`` among them; ``__init__`` checks them and loads what the runs read.

    Raises: ValueError naming the option that is wrong.
    """

    name: ClassVar[str]
    actions: ClassVar[Mapping[str, str]]
    """Help by action: ``run``, ``report`` and ``list``, and ``pilot`` where learning rates are chosen by one."""
    reported: ClassVar[Sequence[str]] = ("pilot", "report")
    """Actions that end with the report."""
    starts: ClassVar[Sequence[str]] = tuple(STARTS)
    """Choices of ``--start``, the default first; empty for a study whose runs say theirs."""

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        _check_values(values)
        if "start" in values:
            check_choice("start", values["start"], self.starts)
        self.action, self.values = action, values
        self.folder = Path(values["output"])

    @classmethod
    def output(cls, action: str) -> str:
        """Folder of the results unless ``--output`` names another."""
        return f"results/{cls.name}"

    @property
    def measured(self) -> Literal["validation", "test"]:
        """What runs are measured on: those of a pilot do not see the test."""
        return "validation" if self.action == "pilot" else "test"

    @property
    def lrs(self) -> Sequence[float | None]:
        """Learning rates that a pilot compares; else None, for that of the model."""
        return self.values.get("lrs", (None,))

    @classmethod
    @abc.abstractmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        """Add the study's own options; ``--output``, ``--shard`` and ``--threads`` are there already."""

    def marked(self, runs: Sequence[QueuedRun]) -> list[QueuedRun]:
        """The runs as they are on disk: with their start, unless it is that of the committed results."""
        start = self._start()
        return [
            run if start is None else replace(run, settings={**run.settings, "start": start}) for run in runs
        ]

    def compute_marked(self, run: QueuedRun, note: Note) -> Mapping[str, Any]:
        """``compute`` of a run that ``marked`` gave, all its models at its start."""
        plain = {name: value for name, value in run.settings.items() if name != "start" or not self.starts}
        constant = STARTS[run.settings.get("start", self.starts[0])] if self.starts else None
        with initializer_range(constant):
            return self.compute(replace(run, settings=plain), note)

    def _start(self) -> str | None:
        start: str | None = self.values.get("start")
        return None if start in (None, *self.starts[:1]) else start

    @abc.abstractmethod
    def runs(self) -> list[QueuedRun]:
        """The queue, in the order in which it is computed."""

    def runs_of_report(self) -> list[QueuedRun]:
        """What the report is about, if that is not ``runs``."""
        return self.runs()

    def prepare(self) -> None:  # noqa: B027
        """Make what the runs need, before the first of them."""

    @abc.abstractmethod
    def compute(self, run: QueuedRun, note: Note) -> Mapping[str, Any]:
        """JSON values of a result, a function of the settings of the run alone."""

    @abc.abstractmethod
    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        """Print tables, and write files and figures into ``folder``, of at least one finished run."""

    def write_summary(
        self, rows: Sequence[Mapping[str, Any]], done: Sequence[FinishedRun], missing: Sequence[QueuedRun]
    ) -> None:
        """``summary.json``: the rows of the table, and which of the runs are missing."""
        n_runs, names = len(done) + len(missing), [run.name for run in missing]
        write_json(self.folder / "summary.json", {"rows": rows, "runs": n_runs, "missing": names})


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises: ValueError for a list that names a thing twice, or a number that its name rules out."""
    for name in values.keys() & {"threads", "steps"}:
        check_integer(name, values[name])
    for lr in values.get("lrs", ()):
        check_positive("lrs", lr)
    for name, value in values.items():
        if isinstance(value, list):
            check(len(set(value)) == len(value), name, value, "without repetition")


def add_names(parser: argparse.ArgumentParser, name: str, default: Sequence[str], help: str = "") -> None:
    """An option for some of the names in ``default``, which are all unless ``help`` says more."""
    text = help or f"of {', '.join(default)}"
    parser.add_argument(f"--{name}", type=str, nargs="+", default=list(default), help=text)


def add_seeds(parser: argparse.ArgumentParser, help: str, default: Sequence[int] = SEEDS) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default), help=help)


def load_data(
    names: Sequence[str], packaged: Mapping[str, Callable[[], T]], read: Callable[[Path], T], files: str
) -> list[T]:
    """The data sets of these names, or in the files or folders of these names.

    Args:
        read: reads one of the user's own.
        files: what such a one is, in words.

    Raises: ValueError for a name that is neither.
    """
    wanted = f"{files} or one of {', '.join(packaged)}"
    for name in names:
        check(name in packaged or Path(name).exists(), "data", name, wanted)
    return [packaged[name]() if name in packaged else read(Path(name)) for name in names]


def add_learning_rates(parser: argparse.ArgumentParser) -> None:
    """What a pilot compares."""
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates")


def spread_text(found: Spread | Mapping[str, Any] | None, digits: int = 4, scale: float = 1) -> str:
    """Mean and deviation over seeds, of a spread or of what a summary holds of one."""
    if found is None:
        return "-"
    spread = found if isinstance(found, Spread) else Spread(**found)
    deviation = "" if spread.deviation is None else f" ± {scale * spread.deviation:.{digits}f}"
    return f"{scale * spread.mean:.{digits}f}{deviation}"


def make_table(title: str, rows: Sequence[Mapping[str, str]], left: int = 1) -> Table:
    """A table with the keys of the first row as columns, the first ``left`` of them words, the others numbers."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    columns = list(rows[0]) if rows else []
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table
