"""Language models, by the name that a checkpoint gives its architecture."""

from helmholtz.models.base import AbstractDecoder
from helmholtz.models.fem_lm import FEMLM
from helmholtz.models.transformer import Transformer

__all__ = ["FEMLM", "MODELS", "Transformer"]

MODELS: dict[str, type[AbstractDecoder]] = {"transformer": Transformer, "fem_lm": FEMLM}
