"""The Free Transformer in the spelling of its first public implementation; the page "From free-transformer" lists
what behaves differently, and why."""

from helmholtz.interop.seeds.free_transformer.config import ModelConfig, TrainingConfig
from helmholtz.interop.seeds.free_transformer.losses import compute_vae_loss
from helmholtz.interop.seeds.free_transformer.model import (
    BinaryMapper,
    EncoderBlock,
    FreeTransformer,
    LatentPlan,
    TransformerBaseline,
)
from helmholtz.interop.seeds.free_transformer.synthetic_data import SyntheticDataGenerator

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
