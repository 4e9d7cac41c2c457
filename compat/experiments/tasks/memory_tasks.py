"""The original ``experiments.tasks.memory_tasks``."""

from helmholtz.interop.seeds.unified.tasks import AssociativeRecallExperiment, ContinualLearningExperiment

__all__ = ["AssociativeRecallExperiment", "ContinualLearningExperiment"]
