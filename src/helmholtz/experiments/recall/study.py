"""The recall study: patterns, values of keys, and pairs in a context."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from helmholtz._checks import check_choice, check_integer
from helmholtz.experiments.base import LIST, Note, make_table
from helmholtz.experiments.queue import FinishedRun, QueuedRun, runs_of
from helmholtz.experiments.recall.data import PairTask
from helmholtz.experiments.recall.learners import LearnerStudy, build_learner
from helmholtz.experiments.recall.patterns import (
    AssociationResult,
    Corruption,
    RecallResult,
    recall_patterns,
    recall_values,
)
from helmholtz.experiments.recall.report import plot_recall
from helmholtz.experiments.recall.run import InContextRecall, recall_by_memory

NOISES = (0.0, 0.5, 1.0, 1.5)
CORRUPTED = (
    Corruption("mask", 0.25),
    Corruption("mask", 0.5),
    Corruption("flip", 0.1),
    Corruption("flip", 0.25),
)
N_SETS = 5
WRITTEN = PairTask(n_pairs=32, n_keys=64, n_values=64)
"""What a memory is asked for that is written as it reads."""
N_WRITTEN, N_ASKED = 1000, 2048
"""Sequences that a memory and a decoder are asked for."""
MEMORY = "memory"
"""The reader of a context that is no decoder."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of the memories."""

    noisy: Mapping[int, Sequence[int]]
    """Numbers of patterns by width, to be recalled from noise."""
    corrupted: Sequence[tuple[int, int]] = ()
    """Widths and numbers of patterns of the rows with masks and flips."""
    pairs: Sequence[int] = ()
    """Numbers of keys and values; without any there are no pairs in a context either."""


PROFILES = {
    "ci": Profile({32: (64, 512), 64: (512,)}, ((64, 512),), (500,)),
    "full": Profile(
        {32: (64, 512, 4096), 64: (512, 4096, 10000), 128: (64, 512, 4096, 10000)},
        ((64, 512), (128, 512), (128, 4096)),
        (500, 2000),
    ),
    "capacity": Profile(
        {
            16: [2**n for n in range(2, 9)],
            32: [2**n for n in range(4, 13)],
            64: [2**n for n in range(8, 15)],
        }
    ),
}
"""``capacity`` follows the margin down, and does nothing else."""


class Recall(LearnerStudy):
    name = "recall"
    learner = "mamba_hopfield"
    actions = {
        "run": "Recall from a Hopfield memory: patterns corrupted by noise, masks and flips beside a float64 oracle "
        "and the nearest neighbour, values from keys, pairs in a context; then the report. Nothing is trained unless "
        "--train_steps says so.",
        "list": LIST,
        "report": "Tables and figure of the runs that are finished.",
    }

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        check_choice("profile", values["profile"], PROFILES)
        for name, minimum in (("trials", 1), ("pairs", 1), ("train_steps", 0), ("seed", 0)):
            check_integer(name, values[name], minimum=minimum)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        super().add_options(parser, action)
        parser.add_argument("--profile", type=str, default="ci", help=f"sizes: {', '.join(PROFILES)}")
        for name, default, text in (
            ("trials", 4096, "queries per row, over five sets of patterns"),
            ("pairs", 4, "pairs in the context of the decoder"),
            ("train_steps", 0, "steps of a decoder on them; 0 trains none"),
            ("seed", 0, "of patterns, queries and weights"),
        ):
            parser.add_argument(f"--{name}", type=int, default=default, help=text)

    def runs(self) -> list[QueuedRun]:
        profile = PROFILES[self.values["profile"]]
        return [*self._patterns(profile), *self._values(profile), *(self._pairs() if profile.pairs else ())]

    def _run(self, name: str, part: str, **settings: Any) -> QueuedRun:
        seed = self.values["seed"]
        return QueuedRun(f"{name}-{seed}", {"part": part, **settings, "seed": seed})

    def _patterns(self, profile: Profile) -> list[QueuedRun]:
        """Noise for every size, masks and flips for some."""
        trials = self.values["trials"]
        rows = [
            (d_model, n_patterns, Corruption("noise", level))
            for d_model, sizes in profile.noisy.items()
            for n_patterns in sizes
            for level in NOISES
        ]
        rows += [(*size, corruption) for size in profile.corrupted for corruption in CORRUPTED]
        return [
            self._run(
                f"patterns-{d_model}x{n_patterns}-{corruption.kind}{corruption.level:g}-{trials}", "patterns",
                d_model=d_model, n_patterns=n_patterns, corruption=asdict(corruption), beta=2.0, n_trials=trials,
                n_sets=N_SETS,
            )
            for d_model, n_patterns, corruption in rows
        ]  # fmt: skip

    def _values(self, profile: Profile) -> list[QueuedRun]:
        """Rows of 64 and 128 numbers: keys of half of them."""
        trials = self.values["trials"]
        return [
            self._run(
                f"values-{d_key}x{n_pairs}-beta{beta:g}-noise{noise:g}-{trials}", "values",
                d_key=d_key, n_pairs=n_pairs, beta=beta, noise=noise, n_trials=trials, n_sets=N_SETS,
            )
            for d_key in (32, 64)
            for n_pairs in profile.pairs
            for beta in (2.0, 4.0, 8.0)
            for noise in (0.0, 0.5)
        ]  # fmt: skip

    def _pairs(self) -> list[QueuedRun]:
        """A memory that is written, an untrained decoder and, if asked for, the trained one."""
        pairs, learner = self.values["pairs"], self.values["learner"]
        task = PairTask(n_pairs=pairs, n_keys=max(16, pairs), n_values=16)
        readers = [(MEMORY, WRITTEN, N_WRITTEN, 0)]
        readers += [(learner, task, N_ASKED, steps) for steps in sorted({0, self.values["train_steps"]})]
        return [
            self._run(
                f"context-{reader}-{task.n_pairs}-{steps}", "context",
                reader=reader, task=asdict(task), n_sequences=n_sequences, steps=steps,
            )
            for reader, task, n_sequences, steps in readers
        ]  # fmt: skip

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        settings = {name: value for name, value in run.settings.items() if name != "part"}
        if run.settings["part"] == "context":
            return read_context(settings, note)
        if run.settings["part"] == "values":
            return recall_values(**settings).to_dict()
        return recall_patterns(**settings | {"corruption": Corruption(**settings["corruption"])}).to_dict()

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        patterns = [RecallResult.from_dict(run.result) for run in runs_of(done, part="patterns")]
        values = [AssociationResult.from_dict(run.result) for run in runs_of(done, part="values")]
        if patterns:
            title = "Patterns recalled (kappa = 0: no gain of a context enters)"
            console.print(make_table(title, [_pattern_cells(result) for result in patterns], left=0))
        if values:
            rows = [_value_cells(result) for result in values]
            console.print(make_table("Values recalled from keys", rows, left=0))
        for run in runs_of(done, part="context"):
            s, result = run.run.settings, run.result
            console.print(
                f"{s['task']['n_pairs']} pairs in a context, {reader_label(s)}: {result['accuracy']:.3f} "
                f"(chance {result['chance']:.3f})",
                markup=False,
            )
        if any(result.corruption.kind == "noise" for result in patterns):
            plot_recall(patterns, self.folder / "recall.png")


STUDY = Recall


def reader_label(settings: Mapping[str, Any]) -> str:
    """Of a run on pairs in a context."""
    if settings["reader"] == MEMORY:
        return "written"
    return f"{'trained' if settings['steps'] else 'untrained'} {settings['reader']}"


def read_context(settings: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Pairs in a context by a memory, or by a decoder after so many steps."""
    task, n_sequences, seed, steps = (
        PairTask(**settings["task"]), settings["n_sequences"], settings["seed"], settings["steps"],
    )  # fmt: skip
    if settings["reader"] == MEMORY:
        return recall_by_memory(task, n_sequences, seed=seed).to_dict()
    sizes = {"vocab_size": task.vocab_size, "n_tokens": task.n_tokens}
    recall = InContextRecall(build_learner(settings["reader"], **sizes, seed=seed), task, seed=seed)

    def tell(step: int, loss: float) -> None:
        note(step, steps)

    if steps:
        recall.train(steps, callback=tell)
    return recall.evaluate(n_sequences).to_dict()


def _pattern_cells(r: RecallResult) -> dict[str, str]:
    return {
        "D": str(r.d_model),
        "K": str(r.n_patterns),
        "margin": f"{r.margin:.1f}{' !' if r.warned else ''}",
        "corruption": f"{r.corruption.kind} {r.corruption.level:g}",
        **_recalled(r),
        "strict": f"{r.strict:.3f}",
        "AUROC": "-" if r.auroc is None else f"{r.auroc:.2f}",
        "": "" if r.agrees() else "DIFFERS",
    }


def _value_cells(r: AssociationResult) -> dict[str, str]:
    return {
        "D key": str(r.d_key),
        "pairs": str(r.n_pairs),
        "beta": f"{r.beta:g}",
        "noise": f"{r.noise:g}",
        **_recalled(r),
        "answered": f"{r.answered:.3f}",
        "": "" if r.agrees() else "DIFFERS",
    }


def _recalled(r: RecallResult | AssociationResult) -> dict[str, str]:
    return {
        "recalled": f"{r.accuracy:.3f}",
        "oracle": f"{r.oracle:.3f}",
        "nearest": f"{r.nearest:.3f}",
        "steps": f"{r.num_steps_mean:.1f} ({r.num_steps_max})",
    }
