"""A queue of independent runs that may be interrupted, resumed, shared by processes and split over machines.

While it works, one file per run, ``results/<name>.json``, holds its settings and its result and nothing that differs
from one computation to the next, so that a queue that was interrupted leaves the same bytes as one that was not. When,
where and how long is beside it in ``timings/<name>.json``. Reports fold the files into ``runs.jsonl``
(``experiments.records``), and a queue that goes on finds them there.
"""

import contextlib
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helmholtz._checks import check, check_integer
from helmholtz._files import write_atomically, write_json
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz._locks import LockedError, locked
from helmholtz.experiments.records import LOCKS, RESULTS, TIMINGS, fold, read_record
from helmholtz.training.checkpoint import first_difference

SEEDS = (0, 1, 2)
"""Of studies that are asked for no others."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True, slots=True)
class QueuedRun:
    """One run of a queue: its name, which is that of its file, and everything that its result depends on."""

    name: str
    settings: Mapping[str, Any]
    """JSON values only."""

    def __post_init__(self) -> None:
        check(NAME.fullmatch(self.name) is not None, "name", self.name, "letters, digits and . _ + = -")
        check_integer("seeds", self.settings.get("seed", 0), minimum=0)
        read_back = json.loads(json.dumps(self.settings, allow_nan=False))
        check(read_back == self.settings, "settings", self.settings, "JSON values (lists, no tuples)")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What is on disk of a run."""

    run: QueuedRun
    result: dict[str, Any]
    timing: dict[str, Any]
    """CPU and wall seconds, date, commit and hardware; empty if it is lost."""

    def setting(self, name: str) -> Any:
        """A setting; of one that is a mapping, as data are, its name."""
        value = self.run.settings[name]
        return value["name"] if isinstance(value, dict) else value


def grouped(done: Sequence[FinishedRun], *names: str) -> dict[tuple[Any, ...], list[FinishedRun]]:
    """The runs by what these settings are, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in done:
        groups.setdefault(tuple(map(run.setting, names)), []).append(run)
    return groups


def values_of(done: Sequence[FinishedRun], name: str) -> list[Any]:
    """What a setting is among the runs, in their order."""
    return [value for (value,) in grouped(done, name)]


def runs_of(done: Sequence[FinishedRun], **settings: Any) -> list[FinishedRun]:
    """The runs with these settings."""
    return grouped(done, *settings).get(tuple(settings.values()), [])


def shard(runs: Sequence[QueuedRun], text: str) -> list[QueuedRun]:
    """The runs of one machine of several: "0/4" is every fourth, from the first.

    Raises: ValueError unless the text is ``i/n`` with 0 <= i < n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(x) for x in found.groups()) if found else (0, 0)
    check(index < count, "shard", text, "i/n with i from 0 to n - 1, such as 0/4")
    return list(runs[index::count])


def finished(folder: Path, run: QueuedRun) -> FinishedRun | None:
    """The run as it lies on disk, None if it is not there.

    Raises: ValueError if it is damaged, or was computed with other settings.
    """
    record = read_record(folder, run.name)
    if record is None:
        return None
    difference = first_difference(record["settings"], dict(run.settings), "settings")
    if difference:
        raise ValueError(
            f"{folder}: {run.name} is a result of other settings: {difference}; choose another folder"
        )
    return FinishedRun(run, record["result"], record["timing"])


def fold_finished(folder: Path, runs: Sequence[QueuedRun]) -> tuple[list[FinishedRun], list[QueuedRun]]:
    """``split_finished`` of a report, which first moves all finished runs of the folder into ``runs.jsonl``."""
    fold(folder)
    return split_finished(folder, runs)


def split_finished(folder: Path, runs: Sequence[QueuedRun]) -> tuple[list[FinishedRun], list[QueuedRun]]:
    """What is done and what is missing, each in the order of ``runs``."""
    found = [(run, finished(folder, run)) for run in runs]
    return [done for _, done in found if done is not None], [run for run, done in found if done is None]


def run_queue(
    runs: Sequence[QueuedRun],
    compute: Callable[[QueuedRun], Mapping[str, Any]],
    folder: Path,
    *,
    report: Callable[[QueuedRun, str], None] = lambda run, event: None,
) -> int:
    """Compute each run that has no result and that no other process is at; returns how many were computed.

    Any number of processes may work in one folder. A run that is interrupted leaves nothing and is computed anew.

    Args:
        compute: gives the JSON values of a result, a function of the settings alone.
        report: told of each run "done before", "in work elsewhere: ...", "begins" or "done in ... s".

    Raises: ValueError for two runs of one name, a result that is not finite JSON, or a file of other settings.
    """
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, "runs", twice, "names that differ")
    computed = 0
    for run in runs:
        with _claimed(folder, run) as other:
            if other:
                report(run, f"in work elsewhere: {other}")
            elif finished(folder, run) is not None:
                report(run, "done before")
            else:
                report(run, "begins")
                report(run, f"done in {_compute(run, compute, folder):.0f} s")
                computed += 1
    return computed


def _compute(
    run: QueuedRun, compute: Callable[[QueuedRun], Mapping[str, Any]], folder: Path
) -> float:  # fmt: skip
    cpu, begin = _cpu_seconds(), time.perf_counter()
    result = compute(run)
    seconds = time.perf_counter() - begin
    try:
        text = json.dumps({"settings": run.settings, "result": result}, indent=1, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"run {run.name}: its result is not finite JSON ({error}): {result}") from error
    timing = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu, 3),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": describe_hardware(),
    }
    write_json(folder / TIMINGS / f"{run.name}.json", timing)
    write_atomically(folder / RESULTS / f"{run.name}.json", text + "\n")
    return seconds


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _claimed(folder: Path, run: QueuedRun) -> Iterator[str]:
    """Who else is at the run; empty if this process has it to itself until the block ends."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCKS / run.name))
        except LockedError as error:
            yield str(error)
            return
        yield ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean of runs that differ in their seed, and how far apart they lie."""

    mean: float
    low: float
    high: float
    n: int
    deviation: float | None
    """Sample standard deviation; None for a single run."""


def spread(values: Sequence[float]) -> Spread:
    """Raises: ValueError if there are none."""
    check_integer("number of values", len(values))
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return Spread(mean, min(values), max(values), len(values), deviation)
