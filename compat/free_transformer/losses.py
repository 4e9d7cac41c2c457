"""The original ``free_transformer.losses``."""

from helmholtz.interop.seeds.free_transformer.losses import (
    FreeTransformerLoss,
    compute_kl_divergence,
    compute_reconstruction_loss,
    compute_vae_loss,
)

__all__ = ["FreeTransformerLoss", "compute_kl_divergence", "compute_reconstruction_loss", "compute_vae_loss"]
