"""The equilibrium study: what small Mamba-Hopfield models learn, with and without each term of their objective."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz._checks import check_choices
from helmholtz.data.corpus import shakespeare_files
from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.data.tokens import TokenDataset
from helmholtz.experiments.base import LIST, Note, Study, add_names, add_seeds, make_table
from helmholtz.experiments.equilibrium.run import (
    STABILITY_WEIGHT,
    learn_bytes,
    learn_pairs,
    learn_periods,
    learn_stability,
)
from helmholtz.experiments.queue import FinishedRun, QueuedRun, runs_of, spread

TASKS: dict[str, dict[str, Any]] = {
    "periods": {"steps": 150, "convergence_weight": 0.05},
    "pairs": {"steps": 1500},
    "bytes": {"steps": 300, "n_bytes": 100_000},
    "stability": {"steps": 200, "stability_weight": STABILITY_WEIGHT},
}
"""Settings by task. The terms of these weights are compared with none."""
MEASURES = {
    "periods": (
        ("cross_entropy", "cross-entropy, nats", ".4f"),
        ("mean_steps", "solver steps, with the term on starts", ".2f"),
        ("mean_steps_without_term", "solver steps, without", ".2f"),
    ),
    "pairs": (
        ("accuracy", "recall of pairs in a context", ".1%"),
        ("accuracy_blocks_alone", "the same by the blocks alone", ".1%"),
    ),
    "bytes": (
        ("bits_per_character", "bits per character of a text", ".3f"),
        ("unigram_bits_per_character", "bits per character by frequencies alone", ".3f"),
        ("converged", "fraction of tokens converged", ".1%"),
    ),
    "stability": (
        ("before", "Lipschitz constant before training", ".2f"),
        ("after", "after, with the stability term", ".2f"),
        ("after_without_term", "after, without", ".2f"),
    ),
}
"""What is shown by task: measure, words, format."""


class Equilibrium(Study):
    name = "equilibrium"
    actions = {
        "run": "Train small Mamba-Hopfield models on periods, pairs in a context, bytes of Hamlet, and from maps that "
        "are too steep; then the report. About two minutes of one core per seed.",
        "list": LIST,
        "report": "Table of the runs that are finished.",
    }
    reported = ("run", "report")

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        check_choices("tasks", values["tasks"], TASKS)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        add_names(parser, "tasks", list(TASKS))
        add_seeds(parser, "of weights and sequences", [0])

    def runs(self) -> list[QueuedRun]:
        return [
            QueuedRun(f"{task}-{seed}", {"task": task, **TASKS[task], "seed": seed})
            for task in self.values["tasks"]
            for seed in self.values["seeds"]
        ]

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        s = run.settings
        seed, steps = s["seed"], s["steps"]
        if s["task"] == "bytes":
            return learn_hamlet(seed, steps=steps, n_bytes=s["n_bytes"])
        if s["task"] == "pairs":
            with_, without = (learn_pairs(seed, equilibrium=chosen, steps=steps) for chosen in (True, False))
            return with_ | {f"{name}_blocks_alone": value for name, value in without.items()}
        if s["task"] == "periods":
            weights = (s["convergence_weight"], 0.0)
            with_, without = (learn_periods(seed, convergence_weight=w, steps=steps) for w in weights)
            return with_ | {f"{name}_without_term": value for name, value in without.items()}
        weights = (s["stability_weight"], 0.0)
        with_, without = (learn_stability(seed, stability_weight=w, steps=steps) for w in weights)
        return with_ | {f"{name}_without_term": without[name] for name in ("after", "largest_after")}

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        rows = []
        for task, measures in MEASURES.items():
            results = [one.result for one in runs_of(done, task=task)]
            for name, words, spec in measures if results else ():
                found = spread([result[name] for result in results])
                values = (found.mean, found.low, found.high)
                mean, low, high = (format(value, spec) for value in values)
                rows.append({"task": task, "measure": words, "mean": mean, "range": f"{low} to {high}"})
        console.print(make_table("Mean and range over seeds", rows, left=2))


STUDY = Equilibrium


def learn_hamlet(seed: int, *, steps: int, n_bytes: int) -> dict[str, float]:
    """``learn_bytes`` on the first bytes of the play, a tenth of them for validation."""
    with tempfile.TemporaryDirectory() as folder:
        play = next(file for file in shakespeare_files() if "hamlet" in file.name)
        text = Path(folder, "hamlet.txt")
        text.write_bytes(play.path.read_bytes()[:n_bytes])
        data = DataConfig(
            folder=f"{folder}/data", sources=(str(text),), tokenizer="bytes", validation_fraction=0.1
        )
        prepare(data)
        splits = [TokenDataset(data.folder, name) for name in ("train", "validation")]
        return learn_bytes(seed, *splits, steps=steps)
