"""Initialisation: small normal weights, residual branches scaled down with depth."""

from collections.abc import Sequence

import torch
from torch import nn

STANDARD_DEVIATION = 0.02


@torch.no_grad()
def init_normal(module: nn.Module) -> None:
    """Draw every linear and embedding weight below ``module`` from N(0, 0.02^2); biases start at 0.

    Weights on the meta device have no memory to draw into.
    """
    for child in module.modules():
        if any(p.is_meta for p in child.parameters(recurse=False)):
            continue
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=STANDARD_DEVIATION)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)


@torch.no_grad()
def scale_residual(projections: Sequence[nn.Linear]) -> None:
    """Scale the ``n`` projections that write into a residual stream by ``n^(-1/2)``.

    The stream is a sum of ``n = 2 n_layers`` branches; so its variance at the start does not grow with depth.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """
    for projection in projections:
        projection.weight.mul_(len(projections) ** -0.5)
