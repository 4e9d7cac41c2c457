"""Losses of language models."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._once import DifferentiableOnce, is_traced


def cross_entropy(
    logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"], *, ignore_index: int = -100
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of ``targets`` in nats per counted token, in at least float32.

    ``targets[:, t]`` belongs to ``logits[:, t]``: the caller has shifted them. Where every target is ``ignore_index``
    the mean is 0 with gradient 0, not 0/0.

    Cost: saves one number per logit; the gradient is made of it in place. Differentiable once.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    flat = targets.flatten()
    if is_traced():
        total = F.cross_entropy(wide, flat, ignore_index=ignore_index, reduction="sum")
    else:
        counted = flat != ignore_index
        total = _NegativeLogLikelihood.call(wide, flat.masked_fill(~counted, 0).unsqueeze(1), counted)
    return total / (targets != ignore_index).sum().clamp(min=1)


class _NegativeLogLikelihood(DifferentiableOnce):
    @staticmethod
    def forward(ctx, logits, targets, counted):  # type: ignore[no-untyped-def]
        log_p = logits.log_softmax(-1)
        total = -log_p.gather(1, targets).squeeze(1).masked_fill(~counted, 0).sum()
        ctx.save_for_backward(log_p, targets, counted, total)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        log_p, targets, counted, _ = ctx.saved_tensors
        out = log_p.exp()
        out.scatter_add_(1, targets, out.new_full((1, 1), -1).expand_as(targets))
        return out.mul_((counted * grad).unsqueeze(1)), None, None
