"""Losses of language models."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype


def cross_entropy(
    logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"], *, ignore_index: int = -100
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of ``targets`` in nats per counted token, in at least float32.

    ``targets[:, t]`` belongs to ``logits[:, t]``: the caller has shifted them. Where every target is ``ignore_index``
    the mean is 0 with gradient 0, not 0/0.

    Cost: the kernel reads the logits once forward and once backward, and saves them and a number per token.
    Raises: IndexError if a target is neither ``ignore_index`` nor in ``[0, vocab)``.
    """
    rows, flat = logits.flatten(0, 1), targets.flatten().long()
    if kernels.usable("cross_entropy", rows, flat) and rows.dtype in kernels.STORED:
        return torch.ops.helmholtz.cross_entropy(rows, flat, ignore_index)[0]
    total = F.cross_entropy(rows.to(compute_dtype(rows)), flat, ignore_index=ignore_index, reduction="sum")
    return total / (flat != ignore_index).sum().clamp(min=1)
