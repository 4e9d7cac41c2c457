"""The continual study: one map after another by a decoder alone, with memories, and on all maps at once."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from helmholtz._checks import check_integer
from helmholtz.experiments.base import LIST, Note, add_seeds, make_table
from helmholtz.experiments.continual.run import (
    ContinualConfig,
    ContinualLearning,
    ContinualResult,
    joint_accuracy,
)
from helmholtz.experiments.queue import FinishedRun, QueuedRun, grouped, runs_of, values_of
from helmholtz.experiments.recall.data import MapTask
from helmholtz.experiments.recall.learners import LearnerStudy, build_learner
from helmholtz.experiments.recall.report import plot_continual

JOINT = "all maps at once"
METHODS = ("no memory", "memory", "drifting keys", "small, fifo", "small, reservoir", JOINT)
MEASURES = {
    "ACC": "accuracy",
    "BWT": "backward_transfer",
    "F": "forgetting",
    "FWT": "forward_transfer",
    "own": "diagonal",
}


def methods(task: MapTask, steps: int) -> dict[str, ContinualConfig]:
    """The settings that are compared; the small memories hold three fifths of all pairs."""
    memory = ContinualConfig(task=task, steps=steps, n_slots=task.n_tasks * task.n_inputs)
    alone, few = replace(memory, keys="none"), replace(memory, n_slots=max(1, memory.n_slots * 3 // 5))
    drifting, sampled = replace(memory, keys="features"), replace(few, policy="reservoir")
    return dict(zip(METHODS, (alone, memory, drifting, few, sampled, alone), strict=True))


class Continual(LearnerStudy):
    name = "continual"
    learner = "transformer"
    actions = {
        "run": "Learn maps over shared inputs and labels, one after another, by a decoder alone, with a memory, with "
        "one whose keys drift, with one that is too small, and on all maps at once; then the report.",
        "list": LIST,
        "report": "Table and figure of the runs that are finished.",
    }

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        for name in ("tasks", "inputs"):
            check_integer(name, values[name])

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        super().add_options(parser, action)
        add_seeds(parser, "each draws maps and weights anew")
        parser.add_argument("--tasks", type=int, default=5, help="maps, one after another")
        parser.add_argument("--inputs", type=int, default=100, help="inputs that the maps share")
        parser.add_argument("--steps", type=int, default=150, help="optimizer steps per map")

    def runs(self) -> list[QueuedRun]:
        task = MapTask(n_tasks=self.values["tasks"], n_inputs=self.values["inputs"])
        return [
            QueuedRun(
                f"{method.replace(',', '').replace(' ', '_')}-{seed}",
                {"method": method, "learner": self.values["learner"], "config": asdict(config), "seed": seed},
            )
            for seed in self.values["seeds"]
            for method, config in methods(task, self.values["steps"]).items()
        ]

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        """All methods of a seed start from the same weights."""
        s = run.settings
        config = ContinualConfig(**s["config"] | {"task": MapTask(**s["config"]["task"])})
        model = build_learner(s["learner"], vocab_size=config.task.vocab_size, n_tokens=2, seed=s["seed"])
        if s["method"] == JOINT:
            return {"accuracies": list(joint_accuracy(model, config, seed=s["seed"]))}
        total = config.task.n_tasks * config.steps
        return (
            ContinualLearning(model, config, seed=s["seed"])
            .run(lambda number, step, loss: note(number * config.steps + step + 1, total))
            .to_dict()
        )

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        results = {
            method: [ContinualResult.from_dict(run.result) for run in runs]
            for (method,), runs in grouped(done, "method").items()
            if method != JOINT
        }
        joint = [run.result["accuracies"] for run in runs_of(done, method=JOINT)]
        rows = [_cells(method, found) for method, found in results.items()]
        rows += [{"": JOINT, "ACC": f"{statistics.fmean(map(statistics.fmean, joint)):.3f}"}] if joint else []
        n_seeds = len(values_of(done, "seed"))
        chance = 1 / done[0].run.settings["config"]["task"]["n_labels"]
        title = f"Mean of {n_seeds} seed{'s' * (n_seeds > 1)}; chance {chance:.2f}"
        console.print(make_table(title, rows))
        if results:
            matrices = {method: _mean_matrix(found) for method, found in results.items()}
            plot_continual(matrices, self.folder / "continual.png", chance=chance)


STUDY = Continual


def _cells(method: str, found: Sequence[ContinualResult]) -> dict[str, str]:
    """Means over seeds."""
    return {
        "": method,
        **{
            column: f"{statistics.fmean(getattr(r, measure) for r in found):.3f}"
            for column, measure in MEASURES.items()
        },
        "writes": str(round(statistics.fmean(r.num_writes for r in found))),
        "kB": f"{statistics.fmean(r.memory_bytes for r in found) / 1000:.0f}",
        "answered": _optional([r.answered for r in found]),
        "key cosine": _optional([r.key_cosine for r in found]),
    }


def _optional(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def _mean_matrix(found: Sequence[ContinualResult]) -> list[list[float]]:
    rows = zip(*(result.matrix for result in found), strict=True)
    return [[statistics.fmean(values) for values in zip(*row, strict=True)] for row in rows]
