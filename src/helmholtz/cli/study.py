"""``helmholtz study NAME run | report | list``: one command for all studies (``experiments.base.Study``)."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from helmholtz._checks import check, check_choice
from helmholtz._display import make_losable
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.experiments.base import COMPUTING, Study
from helmholtz.experiments.queue import QueuedRun, fold_finished, run_queue, shard, split_finished

STUDIES = {
    "letters": "what a plan holds of letters whose entropy is known: the Free Transformer's own experiment",
    "mad": "the six MAD tasks: attention, the Free Energy Mixer and its parts, Mamba, Mamba-Hopfield",
    "selection": "which token every channel can read: attention and free energy against what is predicted",
    "language": "language models of equal parameters on two texts, and how they scale",
    "hybrids": "a plan over FEM and over attention, an equilibrium over FEM-GLA and over Mamba",
    "forecasting": "time series: encoders of attention and of FEM against a linear and a naive forecast",
    "vision": "a small vision transformer of attention or of FEM on digits and Fashion-MNIST",
    "recall": "what a Hopfield memory recalls of corrupted patterns, keys and pairs in a context",
    "equilibrium": "what small Mamba-Hopfield models learn, with and without each term of their objective",
    "continual": "learning one map after another with and without a memory",
}
"""Every study by its folder in ``experiments``."""


def usage() -> str:
    lines = [f"  {name:<13}{summary}" for name, summary in STUDIES.items()]
    return "\n".join(
        [
            "usage: helmholtz study <name> <action> [options]",
            "",
            *lines,
            "",
            "helmholtz study <name> lists its actions: run computes what is missing, report makes tables and",
            "pictures of what is done, list says what is done; pilot chooses learning rates",
        ]
    )


def load_study(name: str) -> type[Study]:
    study: type[Study] = importlib.import_module(f"helmholtz.experiments.{name}.study").STUDY
    return study


def run(arguments: list[str], console: Console) -> int:
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        console.print(usage(), markup=False)
        return 0 if name else 2
    check_choice("study", name, STUDIES)
    study = load_study(name)
    action, *options = rest or [""]
    if action in ("", "-h", "--help"):
        lines = [f"  {name:<8}{text}" for name, text in study.actions.items()]
        console.print(
            "\n".join([f"usage: helmholtz study {name} <action> [options]", "", *lines]), markup=False
        )
        return 0 if action else 2
    check_choice("action", action, study.actions)
    act(study(action, parse_options(study, action, options)), console)
    return 0


def parse_options(study: type[Study], action: str, arguments: list[str]) -> dict[str, Any]:
    parser = make_parser(f"study {study.name} {action}", study.actions[action])
    study.add_options(parser, action)
    parser.add_argument("--output", type=str, default=study.output(action), help="folder of the results")
    if study.starts:
        help = f"initialisation, one of {', '.join(study.starts)}; the committed results used the first"
        parser.add_argument("--start", type=str, default=study.starts[0], help=help)
    if action in COMPUTING:
        parser.add_argument(
            "--shard",
            type=str,
            default="0/1",
            help="part of the grid to compute, i/n: 0/4 is the first of four",
        )
        help = "CPU threads; more help these small models little, and results depend on their number"
        parser.add_argument("--threads", type=int, default=1, help=help)
    return parse(parser, arguments)


def act(study: Study, console: Console) -> None:
    """Do what the study's action says. Raises: ValueError for a report of nothing."""
    if study.action in COMPUTING:
        compute(study, console)
    if study.action == "list":
        list_runs(study, console)
    if study.action in study.reported:
        report(study, console)


def compute(study: Study, console: Console) -> None:
    """Compute what is missing of this machine's share, with bars for the queue and the run on a terminal.

    The queue goes on if nobody reads what is printed any more.
    """
    make_losable(console)
    torch.set_num_threads(study.values["threads"])
    mine = shard(study.marked(study.runs()), study.values["shard"])
    study.prepare()
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        whole, current = bar.add_task("runs", total=len(mine)), bar.add_task("steps", total=None)

        def compute_run(run: QueuedRun) -> Mapping[str, Any]:
            bar.reset(current, description=run.name)
            note = lambda step, total: bar.update(current, completed=step, total=total)  # noqa: E731
            return study.compute_marked(run, note)

        def tell(run: QueuedRun, event: str) -> None:
            bar.advance(whole, event != "begins")
            bar.console.print(f"{run.name}: {event}", markup=False)

        computed = run_queue(mine, compute_run, study.folder, report=tell)
    console.print(f"{computed} of {len(mine)} runs computed; results in {study.folder}", markup=False)


def list_runs(study: Study, console: Console) -> None:
    """A line per run."""
    runs = study.marked(study.runs())
    names = {run.run.name for run in split_finished(study.folder, runs)[0]}
    for run in runs:
        console.print(f"{'done   ' if run.name in names else 'missing'}  {run.name}", markup=False)
    _print_missing(study, len(runs) - len(names), len(runs), console)


def report(study: Study, console: Console) -> None:
    """The study's report, and how much of it is missing."""
    done, missing = fold_finished(study.folder, study.marked(study.runs_of_report()))
    if study.action == "report":
        wanted = f"a folder of results; helmholtz study {study.name} run makes them"
        check(bool(done), "output", str(study.folder), wanted)
    if done:
        study.report(done, missing, console)
    _print_missing(study, len(missing), len(done) + len(missing), console)


def _print_missing(study: Study, n_missing: int, n_runs: int, console: Console) -> None:
    console.print(f"{n_missing} of {n_runs} runs are missing in {study.folder}", markup=False)
