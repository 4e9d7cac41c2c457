"""The difficulty ladder: 66 settings, each the baseline of a task or one step away from it along one axis."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helmholtz._checks import check_choice, check_integer
from helmholtz.experiments.mad.data.base import AbstractMadTask, Examples
from helmholtz.experiments.mad.data.memory import Compression, Memorization, SelectiveCopying
from helmholtz.experiments.mad.data.recall import FuzzyInContextRecall, InContextRecall, NoisyInContextRecall

TASKS: dict[str, AbstractMadTask] = {
    "memorization": Memorization(),
    "compression": Compression(),
    "in-context-recall": InContextRecall(),
    "noisy-in-context-recall": NoisyInContextRecall(),
    "fuzzy-in-context-recall": FuzzyInContextRecall(),
    "selective-copying": SelectiveCopying(),
}
"""The tasks at their baseline sizes, the cheapest to train first."""

BASELINE = "baseline"
_RECALL: dict[str, tuple[Any, ...]] = {
    "vocab_size": (32, 64, 128),
    "seq_len": (256, 512, 1024),
    "n_train": (6400, 3200, 1600, 800),
}
_AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
    "compression": _RECALL | {"seq_len": (64, 128, 256)},
    "in-context-recall": _RECALL,
    "noisy-in-context-recall": _RECALL | {"vocab_size": (48, 80, 144), "frac_noise": (0.4, 0.6, 0.8)},
    "fuzzy-in-context-recall": _RECALL,
    "selective-copying": _RECALL | {"seq_len": (512, 1024), "n_copied": (32, 64, 96)},
}
_N_TRAIN = {"memorization": 256}
N_TRAIN, N_TEST = 12_800, 1_280
DATA_SEED = 12345
"""The published seed, which is that of run 0 here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadSetting:
    """A task at some sizes, and how many sequences of it there are."""

    task_name: str
    name: str = BASELINE
    """``baseline``, or what differs from it, such as ``seq_len=256``."""
    task: AbstractMadTask
    n_train: int = N_TRAIN
    n_test: int = N_TEST

    def __post_init__(self) -> None:
        check_choice("task_name", self.task_name, TASKS)
        check_integer("n_train", self.n_train)
        check_integer("n_test", self.n_test)


def baseline(task_name: str) -> MadSetting:
    """Raises: ValueError for an unknown task."""
    check_choice("task_name", task_name, TASKS)
    n_train = _N_TRAIN.get(task_name, N_TRAIN)
    return MadSetting(task_name=task_name, task=TASKS[task_name], n_train=n_train)


def ladder(task_name: str) -> tuple[MadSetting, ...]:
    """The baseline of a task, and every step of its difficulty. Raises: ValueError for an unknown task."""
    first = baseline(task_name)
    return (first, *(_step(first, axis, to) for axis, steps in _AXES[task_name].items() for to in steps))


def _step(first: MadSetting, axis: str, to: Any) -> MadSetting:
    name = f"{axis}={to}"
    if axis == "n_train":
        return replace(first, name=name, n_train=to)
    task: Any = first.task
    return replace(first, name=name, task=replace(task, **{axis: to}))


def draw(setting: MadSetting, *, seed: int) -> tuple[Examples, Examples]:
    """Training and test sequences of run ``seed``, one stream of random numbers for both, training first."""
    check_integer("seed", seed, minimum=0)
    generator = np.random.default_rng(DATA_SEED + seed)
    train = setting.task.sample(setting.n_train, training=True, generator=generator)
    return train, setting.task.sample(setting.n_test, training=False, generator=generator)
