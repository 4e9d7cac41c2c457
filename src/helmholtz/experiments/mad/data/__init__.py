"""The six tasks of the MAD benchmark as laws: sizes, and sequences drawn from a generator."""

from helmholtz.experiments.mad.data.base import IGNORED, AbstractMadTask, Examples
from helmholtz.experiments.mad.data.ladder import BASELINE, N_TEST, TASKS, MadSetting, baseline, draw, ladder
from helmholtz.experiments.mad.data.memory import Compression, Memorization, SelectiveCopying
from helmholtz.experiments.mad.data.recall import FuzzyInContextRecall, InContextRecall, NoisyInContextRecall

__all__ = [
    "BASELINE",
    "IGNORED",
    "N_TEST",
    "TASKS",
    "AbstractMadTask",
    "Compression",
    "Examples",
    "FuzzyInContextRecall",
    "InContextRecall",
    "MadSetting",
    "Memorization",
    "NoisyInContextRecall",
    "SelectiveCopying",
    "baseline",
    "draw",
    "ladder",
]
