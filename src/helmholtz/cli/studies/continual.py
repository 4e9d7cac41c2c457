"""``helmholtz study continual``."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check_choice, check_integer
from helmholtz._display import make_losable
from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.learners import LEARNERS, build_learner
from helmholtz.cli.studies.queues import read_content
from helmholtz.experiments.continual.run import (
    ContinualConfig,
    ContinualLearning,
    ContinualResult,
    joint_accuracy,
)
from helmholtz.experiments.recall.data import MapTask
from helmholtz.experiments.recall.report import plot_continual
from helmholtz.models.decoder import Decoder

ACTIONS = {
    "run": "Learn maps over shared inputs and labels, one after another, by a decoder alone, with a memory, with one "
    "whose keys drift, with one that is too small, and on all maps at once; then the report.",
    "report": "Table and picture of continual.json.",
    "list": "What continual.json holds.",
}
CONTINUAL = "continual.json"
JOINT = "all maps at once"


def runs(task: MapTask, steps: int) -> dict[str, ContinualConfig]:
    """The settings that are compared; the small memories hold three fifths of all pairs."""
    memory = ContinualConfig(task=task, steps=steps, n_slots=task.n_tasks * task.n_inputs)
    few = replace(memory, n_slots=max(1, memory.n_slots * 3 // 5))
    return {
        "no memory": replace(memory, keys="none"),
        "memory": memory,
        "drifting keys": replace(memory, keys="features"),
        "small, fifo": few,
        "small, reservoir": replace(few, policy="reservoir"),
    }


def learn(
    learner: str, settings: Mapping[str, ContinualConfig], seed: int, console: Console
) -> tuple[dict[str, ContinualResult], list[float]]:
    """Every run from the same initial weights, and the accuracies of joint training."""
    results = {}
    for name, config in settings.items():
        with console.status(f"seed {seed}: {name}"):
            results[name] = ContinualLearning(_build(learner, config, seed), config, seed=seed).run()
    config = settings["no memory"]
    with console.status(f"seed {seed}: {JOINT}"):
        return results, list(joint_accuracy(_build(learner, config, seed), config, seed=seed))


def _build(learner: str, config: ContinualConfig, seed: int) -> Decoder:
    return build_learner(learner, vocab_size=config.task.vocab_size, n_tokens=2, seed=seed)


def result_table(
    results: Mapping[str, list[ContinualResult]], joint: list[list[float]], chance: float
) -> Table:
    """Means over seeds."""
    n_seeds = len(joint)
    table = Table(
        title=f"Mean of {n_seeds} seed{'s' * (n_seeds > 1)}; chance {chance:.2f}",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "ACC", "BWT", "F", "FWT", "own", "writes", "kB", "answered", "key cosine"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, found in results.items():
        numbers = [
            statistics.fmean(getattr(r, measure) for r in found)
            for measure in ("accuracy", "backward_transfer", "forgetting", "forward_transfer", "diagonal")
        ]
        table.add_row(
            name,
            *(f"{number:.3f}" for number in numbers),
            str(round(statistics.fmean(r.num_writes for r in found))),
            f"{statistics.fmean(r.memory_bytes for r in found) / 1000:.0f}",
            _optional([r.answered for r in found]),
            _optional([r.key_cosine for r in found]),
        )
    table.add_row(JOINT, f"{statistics.fmean(statistics.fmean(row) for row in joint):.3f}")
    return table


def _optional(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study continual {action}", ACTIONS[action])
    parser.add_argument("--output", type=str, default="results/memory", help="folder of the result")
    if action != "run":
        return parse(parser, arguments)
    parser.add_argument("--learner", type=str, default="transformer", help=f"one of {', '.join(LEARNERS)}")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws maps and weights anew"
    )
    parser.add_argument("--tasks", type=int, default=5, help="maps, one after another")
    parser.add_argument("--inputs", type=int, default=100, help="inputs that the maps share")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps per map")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    values = parse(parser, arguments)
    check_choice("learner", values["learner"], LEARNERS)
    for name in ("tasks", "inputs", "steps", "threads"):
        check_integer(name, values[name])
    for seed in values["seeds"]:
        check_integer("seeds", seed, minimum=0)
    return values


def compute(values: dict[str, Any], console: Console) -> dict[str, Any]:
    """What ``continual.json`` holds."""
    torch.set_num_threads(values["threads"])
    task = MapTask(n_tasks=values["tasks"], n_inputs=values["inputs"])
    settings = runs(task, values["steps"])
    results: dict[str, list[ContinualResult]] = {name: [] for name in settings}
    joint = []
    for seed in values["seeds"]:
        found, together = learn(values["learner"], settings, seed, console)
        joint.append(together)
        for name, result in found.items():
            results[name].append(result)
    return {
        "learner": values["learner"],
        "seeds": values["seeds"],
        "runs": {
            name: {"config": asdict(settings[name]), "seeds": [result.to_dict() for result in found]}
            for name, found in results.items()
        },
        "joint": joint,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": describe_hardware(),
    }


def report(folder: Path, console: Console) -> None:
    """Table and picture. Raises: ValueError if there are no results, or they are damaged."""
    content = read_content(folder / CONTINUAL, "continual")
    try:
        results = {
            name: [ContinualResult.from_dict(values) for values in run["seeds"]]
            for name, run in content["runs"].items()
        }
        joint, chance = content["joint"], results["no memory"][0].chance
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / CONTINUAL}: damaged ({error!r}); run the study again") from error
    console.print(result_table(results, joint, chance))
    matrices = {
        name: [[statistics.fmean(values) for values in zip(*rows, strict=True)]
               for rows in zip(*(result.matrix for result in found), strict=True)]
        for name, found in results.items()
    }  # fmt: skip
    plot_continual(matrices, folder / "continual.png", chance=chance)
    console.print(f"wrote {folder / 'continual.png'}; the numbers are in {folder / CONTINUAL}", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    make_losable(console)
    values = options(action, arguments)
    folder = Path(values["output"])
    if action == "run":
        content = compute(values, console)
        write_atomically(folder / CONTINUAL, json.dumps(content, indent=1) + "\n")
    if action == "list":
        content = read_content(folder / CONTINUAL, "continual")
        names, seeds = (", ".join(map(str, content.get(part, ()))) for part in ("runs", "seeds"))
        console.print(f"{folder / CONTINUAL}: {names}; seeds {seeds}", markup=False)
    else:
        report(folder, console)
