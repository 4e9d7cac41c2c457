"""The original ``free_transformer.encoder``."""

from helmholtz.interop.seeds.free_transformer.model import EncoderBlock

__all__ = ["EncoderBlock"]
