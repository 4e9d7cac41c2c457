"""The original ``free_transformer.train_utils``."""

from helmholtz.interop.seeds.free_transformer.train_utils import (
    LRScheduler,
    Trainer,
    cleanup_distributed,
    count_parameters,
    load_checkpoint,
    save_checkpoint,
    setup_distributed,
    wrap_model_fsdp,
)

__all__ = [
    "LRScheduler",
    "Trainer",
    "cleanup_distributed",
    "count_parameters",
    "load_checkpoint",
    "save_checkpoint",
    "setup_distributed",
    "wrap_model_fsdp",
]
