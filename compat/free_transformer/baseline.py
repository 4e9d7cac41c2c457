"""The original ``free_transformer.baseline``."""

from helmholtz.interop.seeds.free_transformer.model import TransformerBaseline

__all__ = ["TransformerBaseline"]
