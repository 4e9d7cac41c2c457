"""The objective, in the original names. All in nats."""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz._checks import check, check_non_negative
from helmholtz.ops.binary_latent import free_bits as hinge
from helmholtz.ops.binary_latent import kl_per_token
from helmholtz.ops.losses import cross_entropy

HALF_A_BIT = 0.3466
"""The original's default, in nats."""


def compute_reconstruction_loss(
    logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"], ignore_index: int = -100
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the targets that count; 0 where none does."""
    return cross_entropy(logits, targets, ignore_index=ignore_index)


def compute_kl_divergence(
    z_logits: Float[Tensor, "B T H"],
    latent_dim: int = 16,
    free_bits: float = HALF_A_BIT,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of what each token's KL exceeds ``free_bits`` (nats) by; pads (``mask`` False) not counted."""
    check(z_logits.shape[-1] == latent_dim, "z_logits", tuple(z_logits.shape), f"{latent_dim} bits wide")
    return hinge(kl_per_token(z_logits), free_bits, mask=mask)


def compute_vae_loss(
    logits: Float[Tensor, "B T vocab"],
    targets: Int[Tensor, "B T"],
    z_logits: Float[Tensor, "B T H"],
    latent_dim: int = 16,
    beta_kl: float = 1.0,
    free_bits: float = HALF_A_BIT,
    ignore_index: int = -100,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Reconstruction plus ``beta_kl`` times the hinge, and what they are made of.

    Tokens whose target is ``ignore_index`` count in neither. ``metrics/kl_raw`` is the KL before the hinge (0: the
    plan is not used). ``metrics/perplexity`` is the reconstruction's, which has seen its targets: not the model's.
    """
    check_non_negative("beta_kl", beta_kl)
    counted = targets != ignore_index
    reconstruction = compute_reconstruction_loss(logits, targets, ignore_index)
    kl = compute_kl_divergence(z_logits, latent_dim, free_bits, counted)
    loss = reconstruction + beta_kl * kl
    metrics = {
        "loss/total": loss.item(),
        "loss/reconstruction": reconstruction.item(),
        "loss/kl": kl.item(),
        "loss/kl_weighted": beta_kl * kl.item(),
        "metrics/kl_raw": compute_kl_divergence(z_logits.detach(), latent_dim, 0.0, counted).item(),
        "metrics/perplexity": math.exp(min(reconstruction.item(), 700.0)),
    }
    return loss, metrics


class FreeTransformerLoss(nn.Module):
    """``compute_vae_loss`` with its settings kept."""

    def __init__(
        self,
        latent_dim: int = 16,
        beta_kl: float = 1.0,
        free_bits: float = HALF_A_BIT,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.latent_dim, self.beta_kl = latent_dim, beta_kl
        self.free_bits, self.ignore_index = free_bits, ignore_index

    def forward(
        self,
        logits: Float[Tensor, "B T vocab"],
        targets: Int[Tensor, "B T"],
        z_logits: Float[Tensor, "B T H"],
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        return compute_vae_loss(
            logits, targets, z_logits, self.latent_dim, self.beta_kl, self.free_bits, self.ignore_index
        )
