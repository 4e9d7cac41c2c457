"""``from free_transformer import FreeTransformer, ModelConfig``, as the original README has it."""

from helmholtz.interop.seeds.free_transformer import (
    BinaryMapper,
    EncoderBlock,
    FreeTransformer,
    LatentPlan,
    ModelConfig,
    SyntheticDataGenerator,
    TrainingConfig,
    TransformerBaseline,
    compute_vae_loss,
)

__all__ = [
    "BinaryMapper",
    "EncoderBlock",
    "FreeTransformer",
    "LatentPlan",
    "ModelConfig",
    "SyntheticDataGenerator",
    "TrainingConfig",
    "TransformerBaseline",
    "compute_vae_loss",
]
