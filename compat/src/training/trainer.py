"""The original ``src.training.trainer``."""

from helmholtz.interop.seeds.unified.trainer import CurriculumConfig, UnifiedModelTrainer

__all__ = ["CurriculumConfig", "UnifiedModelTrainer"]
