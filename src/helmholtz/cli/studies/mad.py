"""``helmholtz study mad``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from helmholtz._checks import check, check_choice
from helmholtz._display import make_losable
from helmholtz._files import write_atomically
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.queues import LIST, add_shard, add_threads, check_options, list_runs
from helmholtz.experiments.mad.plots import plot_accuracy, plot_curves
from helmholtz.experiments.mad.report import markdown, report_content, rows_of, table_lines
from helmholtz.experiments.mad.run import PROFILES, MadRun, chosen_rates
from helmholtz.experiments.queue import QueuedRun, fold_finished, run_queue, shard

ACTIONS = {
    "run": "Train the models of a profile on the MAD tasks. Finished runs are kept, an interrupted queue goes on.",
    "report": "Table, pictures and report.json of a profile's finished runs, beside the published rows.",
    "list": LIST,
    "pilot": "Choose the learning rate of each task for the profile quick: attention alone, on a seed of its own.",
}
RATES = "learning_rates.json"


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study mad {action}", ACTIONS[action])
    if action != "pilot":
        parser.add_argument("--profile", type=str, default="quick", help=f"one of {', '.join(PROFILES)}")
    if action in ("run", "list"):
        parser.add_argument("--models", type=str, nargs="+", default=[], help="default: all of the profile")
        parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: those of the profile")
    if action != "report":
        parser.add_argument("--tasks", type=str, nargs="+", default=[], help="default: all six")
    if action in ("run", "pilot"):
        add_shard(parser)
        add_threads(parser)
    parser.add_argument(
        "--output", type=str, default="results/mad", help="folder; each profile has one in it"
    )
    defaults = {"profile": "pilot", "models": [], "seeds": [], "tasks": [], "threads": 1}
    values = defaults | parse(parser, arguments)
    check_choice("profile", values["profile"], PROFILES)
    check_options(values, "models", "seeds", "tasks")
    return values


def runs_of(values: dict[str, Any]) -> list[MadRun]:
    """The runs that the options name, in the order of the queue, without regard to the shard."""
    profile = PROFILES[values["profile"]]
    return profile.runs(
        values["tasks"] or list(profile.settings),
        values["models"] or profile.models,
        values["seeds"] or profile.seeds,
    )


def work(runs: Sequence[MadRun], share: str, folder: Path, console: Console) -> int:
    """Compute the share of this machine with a bar per queue and run; returns how many were computed."""
    make_losable(console)
    by_name = {run.name: run for run in runs}
    queue = shard([run.queued() for run in runs], share)
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        whole, current = bar.add_task("runs", total=len(queue)), bar.add_task("steps", total=None)

        def compute(queued: QueuedRun) -> dict[str, Any]:
            run = by_name[queued.name]
            total = run.protocol.n_steps(run.setting.n_train)
            bar.reset(current, total=total, description=queued.name)
            return run.compute(lambda step: bar.update(current, completed=step))

        def report(queued: QueuedRun, event: str) -> None:
            if event != "begins":
                bar.advance(whole)
                bar.console.print(f"{queued.name}: {event}", markup=False)

        return run_queue(queue, compute, folder, report=report)


def write_rates(runs: Sequence[MadRun], folder: Path, file: Path, console: Console) -> None:
    """What the pilot chose, unless runs are missing."""
    done, missing = fold_finished(folder, [run.queued() for run in runs])
    if missing:
        console.print(f"{len(missing)} runs of the pilot are missing: no learning rate is chosen yet")
        return
    rates = chosen_rates(done)
    tried = [
        {"task": d.run.settings["task"], "lr": d.run.settings["lr"], "seed": d.run.settings["seed"],
         "score": d.result["score"], "loss": d.result["final"] and d.result["final"]["loss"],
         "commit": d.timing.get("commit"), "hardware": d.timing.get("hardware")}
        for d in done
    ]  # fmt: skip
    content = {"learning_rates": rates, "protocol": done[0].run.settings["protocol"], "tried": tried}
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {file}: LEARNING_RATES = {rates}", markup=False)


def write_report(values: dict[str, Any], folder: Path, console: Console) -> None:
    """Raises: ValueError if there is no finished run."""
    name = values["profile"]
    profile = PROFILES[name]
    done, missing = fold_finished(folder, [run.queued() for run in runs_of(values)])
    check(bool(done), "output", str(folder), "a folder with finished runs of this profile")
    rows = rows_of(profile, done)
    lines = table_lines(rows, list(profile.settings))
    console.print(_table(lines))
    content = report_content(name, profile, done, missing)
    console.print(f"{len(done)} runs, {len(missing)} missing, {len(content['diverged'])} diverged")
    write_atomically(folder / "report.json", json.dumps(content, indent=1) + "\n")
    write_atomically(folder / "report.md", markdown(content, lines))
    plot_accuracy(rows, folder / "accuracy.png")
    plot_curves(done, profile.protocol.accuracy, folder / "curves.png")
    console.print(f"wrote report.json, report.md, accuracy.png and curves.png in {folder}", markup=False)


def _table(lines: Sequence[Sequence[str]]) -> Table:
    """Without the parameters, and with deviations below the means: that fits into 80 columns."""
    table = Table(title="Accuracy in per cent", box=None, padding=(0, 1, 0, 0))
    for index, (label, _, *cells) in enumerate(lines):
        if index:
            table.add_row(label, *(cell.replace(" ± ", "\n± ") for cell in cells))
        else:
            table.add_column(label, no_wrap=True)
            for cell in cells:
                table.add_column(cell, justify="right", no_wrap=True)
    return table


def act(action: str, arguments: list[str], console: Console) -> None:
    values = options(action, arguments)
    torch.set_num_threads(values["threads"])
    output = Path(values["output"])
    folder = output / values["profile"]
    if action == "report":
        write_report(values, folder, console)
        return
    runs = runs_of(values)
    if action == "list":
        list_runs(folder, [run.queued() for run in runs], console)
        return
    computed = work(runs, values["shard"], folder, console)
    console.print(f"{computed} of {len(runs)} runs computed; results in {folder}", markup=False)
    if action == "pilot":
        every = runs_of(values | {"tasks": []})
        write_rates(every, folder, output / RATES, console)
