"""What ``labels`` ask for: the objectives of this library's trainer, with pads and labels that do not count."""

import torch
from torch import Tensor

from helmholtz._checks import check
from helmholtz.layers.equilibrium_reading import start_distance
from helmholtz.models.base import AbstractDecoder, LMOutput
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.mamba_hopfield import MambaHopfield
from helmholtz.ops.binary_latent import bits_to_nats, free_bits, kl_per_token
from helmholtz.ops.losses import cross_entropy

IGNORED = -100


def read_with_loss(
    model: AbstractDecoder, tokens: Tensor, mask: Tensor | None, labels: Tensor, objective: dict[str, float]
) -> tuple[Tensor, LMOutput]:
    r"""Loss in nats per counted token, and the logits it was read from.

    Label ``t`` is asked of the logits at ``t - 1``, as everywhere in transformers; ``-100`` is not asked. In training
    the loss is

    * the mean cross-entropy;
    * of a MambaHopfield, plus ``convergence_weight`` times the mean of ``start_distance``;
    * of a FreeTransformer, under a plan drawn from the encoder (torch's global generator),
      :math:`\mathrm{CE} + \frac1T \sum_t \max(0, \mathrm{KL}_t - \kappa)` over the real tokens.

    In evaluation mode it is what the model says of the text: the cross-entropy, and of a FreeTransformer the negative
    ELBO, ``(CE total + KL total) / counted``, an upper bound of its own cross-entropy from one draw. The logits of a
    FreeTransformer are in both cases those under the encoder's plan, which has seen the tokens that are asked for.

    Raises: ValueError for labels of another shape or dtype, or outside the vocabulary.
    """
    targets = _targets(model, tokens, labels)
    if isinstance(model, FreeTransformer):
        return _planned(model, tokens, mask, targets, objective["kappa_bits"])
    output = model(tokens, attention_mask=mask)
    loss = cross_entropy(output.logits[:, :-1], targets)
    if isinstance(model, MambaHopfield) and model.training and objective["convergence_weight"]:
        distance = start_distance(model.equilibrium, output.equilibrium).mean()
        loss = loss + objective["convergence_weight"] * distance
    return loss, output


def _planned(
    model: FreeTransformer, tokens: Tensor, mask: Tensor | None, targets: Tensor, kappa_bits: float
) -> tuple[Tensor, LMOutput]:
    half = model.lower(tokens, attention_mask=mask)
    plan = model.sample_posterior(half)
    assert plan.logits is not None
    output, kl = model.upper(half, plan), kl_per_token(plan.logits)
    nats = cross_entropy(output.logits[:, :-1], targets)
    if model.training:
        return nats + free_bits(kl, bits_to_nats(kappa_bits), mask=half.layout.mask), output
    # the KL of a pad is 0, as its logits are
    return nats + kl.sum() / (targets != IGNORED).sum().clamp(min=1), output


def _targets(model: AbstractDecoder, tokens: Tensor, labels: Tensor) -> Tensor:
    check(labels.shape == tokens.shape, "labels", tuple(labels.shape), f"of shape {tuple(tokens.shape)}")
    check(labels.dtype in (torch.int32, torch.int64), "labels", labels.dtype, "int32 or int64")
    targets = labels[:, 1:].long()
    asked = targets[targets != IGNORED]
    if asked.numel():
        low, high, size = int(asked.min()), int(asked.max()), model.config.vocab_size
        check(
            low >= 0 and high < size,
            "labels",
            f"values from {low} to {high}",
            f"in [0, {size}), or {IGNORED}",
        )
    return targets
