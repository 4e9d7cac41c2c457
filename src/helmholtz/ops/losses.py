"""Losses of language models."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._recompute import recomputed


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


def head_cross_entropy(
    head: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    *,
    most_tokens: int,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """``cross_entropy(head(x), targets)`` with the logits of ``most_tokens`` tokens at a time.

    More tokens than that are read in pieces of one size, and the backward pass calls ``head`` again for each piece. The
    value and all gradients are those of the whole to rounding: under autocast every piece's gradient of the head's
    weights is added up in the weights' own dtype.

    Args:
        head: a module that makes a token's logits of its vector; called with ``1 n D``.

    Cost: the head's forward pass once more. Memory: the logits of one piece and their gradient.
    """
    tokens = targets.numel()
    if tokens <= most_tokens:
        return cross_entropy(head(x), targets, ignore_index=ignore_index)
    size = math.ceil(tokens / math.ceil(tokens / most_tokens))
    kind, total = x.device.type, x.new_zeros((), dtype=compute_dtype(x))

    def nats(part: Tensor, wanted: Tensor) -> Tensor:
        # autocast's cache would give all pieces one narrow copy of the weights, in which their gradients were summed
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            mean = cross_entropy(head(part), wanted, ignore_index=ignore_index)
        return mean * (wanted != ignore_index).sum()

    rows = x.flatten(0, 1).unsqueeze(0).split(size, dim=1)
    for part, wanted in zip(rows, targets.flatten().unsqueeze(0).split(size, dim=1), strict=True):
        total = total + recomputed(nats, part, wanted, draws=True)
    return total / (targets != ignore_index).sum().clamp(min=1)
