"""The original ``free_transformer.model``."""

from helmholtz.interop.seeds.free_transformer.model import (
    FreeTransformer,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    TransformerBlock,
)

__all__ = ["FreeTransformer", "RMSNorm", "RotaryEmbedding", "SwiGLU", "TransformerBlock"]
