"""The baseline: a Llama-style decoder.

Pre-norm blocks with RMSNorm, rotary grouped-query softmax attention and a SwiGLU feed-forward, no biases:
from a Llama's weights it computes the same logits.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from helmholtz.models.base import AttentionModelConfig, ModelConfig
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig(AttentionModelConfig):
    """Sizes of the baseline decoder."""


@final
class Transformer(Decoder):
    """Decoder of softmax attention blocks (Touvron et al., "LLaMA", 2023, with grouped-query heads)."""

    config_class: ClassVar[type[ModelConfig]] = TransformerConfig
    config: TransformerConfig


def small(vocab_size: int) -> TransformerConfig:
    """About 0.8 M parameters beside the embedding: learns characters on a CPU in minutes."""
    return TransformerConfig(vocab_size=vocab_size, d_model=128, n_layers=4, n_heads=4, max_seq_len=256)


def medium(vocab_size: int) -> TransformerConfig:
    """About 25 M parameters beside the embedding."""
    return TransformerConfig(vocab_size=vocab_size, d_model=512, n_layers=8, n_heads=8, max_seq_len=1024)
