"""Losses of language models."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"], *, ignore_index: int = -100
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of ``targets`` in nats per counted token, in at least float32.

    ``targets[:, t]`` belongs to ``logits[:, t]``: the caller has shifted them. Where every target is ``ignore_index``
    the mean is 0 with gradient 0, not 0/0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(wide, targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)
