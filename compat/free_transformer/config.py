"""The original ``free_transformer.config``."""

from helmholtz.interop.seeds.free_transformer.config import DataConfig, ModelConfig, TrainingConfig

__all__ = ["DataConfig", "ModelConfig", "TrainingConfig"]
