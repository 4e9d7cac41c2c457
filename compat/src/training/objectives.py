"""The original ``src.training.objectives``."""

from helmholtz.interop.seeds.unified.objectives import UnifiedTrainingObjective

__all__ = ["UnifiedTrainingObjective"]
