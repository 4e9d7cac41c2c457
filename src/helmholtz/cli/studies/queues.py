"""What the studies share: options of a queue, and what they say of one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz._checks import check, check_integer
from helmholtz._display import make_losable
from helmholtz._files import write_atomically
from helmholtz._json import parse_json
from helmholtz.cli.arguments import Parser
from helmholtz.experiments.queue import QueuedRun, split_finished

LIST = "What is done and what is missing."


def list_runs(folder: Path, runs: Sequence[QueuedRun], console: Console) -> None:
    """A line per run."""
    done, missing = split_finished(folder, runs)
    names = {run.run.name for run in done}
    for run in runs:
        console.print(f"{'done   ' if run.name in names else 'missing'}  {run.name}", markup=False)
    console.print(f"{len(missing)} of {len(runs)} runs are missing in {folder}", markup=False)


def add_shard(parser: Parser) -> None:
    parser.add_argument("--shard", type=str, default="0/1", help="share of this machine: 0/4 is a quarter")


def add_threads(parser: Parser) -> None:
    help = "CPU threads; more help these small models little, and results depend on their number"
    parser.add_argument("--threads", type=int, default=1, help=help)


def check_options(values: Mapping[str, Any], *lists: str) -> None:
    """Raises: ValueError if ``threads`` is no count or one of ``lists`` names a thing twice."""
    check_integer("threads", values.get("threads", 1))
    for name in lists:
        check(len(set(values[name])) == len(values[name]), name, values[name], "without repetition")


def announced(console: Console) -> Callable[[QueuedRun, str], None]:
    """Tells what becomes of each run, for as long as somebody reads it: the queue goes on in any case."""
    make_losable(console)
    return lambda run, event: console.print(f"{run.name}: {event}", markup=False)


def spread_text(found: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Mean and deviation over seeds, as summaries hold them."""
    if found is None:
        return "-"
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{deviation}"


def write_summary(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[QueuedRun],
    missing: Sequence[QueuedRun],
    console: Console,
) -> None:
    """``summary.json``: the rows of the table, and which of the runs are missing."""
    file = folder / "summary.json"
    content = {"rows": rows, "runs": len(runs), "missing": [run.name for run in missing]}
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    console.print(f"{len(missing)} of {len(runs)} runs are missing; wrote {file}", markup=False)


def read_content(file: Path, study: str) -> dict[str, Any]:
    """The result file of a study that is no queue. Raises: ValueError if it is not there, or damaged."""
    check(
        file.is_file(),
        "output",
        str(file.parent),
        f"a folder of results; helmholtz study {study} run makes them",
    )
    try:
        return dict(parse_json(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); run the study again") from error
