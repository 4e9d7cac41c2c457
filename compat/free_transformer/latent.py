"""The original ``free_transformer.latent``."""

from helmholtz.interop.seeds.free_transformer.latent import BinaryMapper, LatentPlan

__all__ = ["BinaryMapper", "LatentPlan"]
