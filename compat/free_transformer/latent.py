"""The original ``free_transformer.latent``."""

from helmholtz.interop.seeds.free_transformer.model import BinaryMapper, LatentPlan

__all__ = ["BinaryMapper", "LatentPlan"]
