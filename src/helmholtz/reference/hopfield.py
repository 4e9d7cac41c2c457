"""The modern Hopfield energy in float64, one pattern after another, as Ramsauer et al. 2020 write it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def _active(patterns: Tensor, log_prior: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """``(pattern, log-prior)`` of every row that is not empty."""
    if log_prior is None:
        log_prior = torch.zeros(len(patterns))
    rows = zip(patterns.double().unbind(0), log_prior.double().unbind(0), strict=True)
    return [(m, b) for m, b in rows if b > -math.inf]


def hopfield_weights(
    z: Float[Tensor, "N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "N K"]:
    """``e^{beta m_i . z + b_i}`` over their sum; 0 where nothing is stored."""
    z = z.double()
    log_prior = torch.zeros(len(patterns)) if log_prior is None else log_prior
    scores = [beta * (z * m).sum(-1) + b for m, b in zip(patterns.double(), log_prior.double(), strict=True)]
    if not any(b > -math.inf for b in log_prior):
        return z.new_zeros(len(z), len(patterns))
    table = torch.stack(scores, dim=-1)
    exponentials = (table - table.detach().amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def hopfield_retrieve(
    z: Float[Tensor, "N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "N D"]:
    """``sum_i p_i m_i``."""
    weights = hopfield_weights(z, patterns, beta, log_prior)
    total = torch.zeros_like(z.double())
    for i, m in enumerate(patterns.double().unbind(0)):
        total = total + weights[:, i : i + 1] * m
    return total


def hopfield_potential(
    z: Float[Tensor, "N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "N"]:
    """``beta^-1 log(mean over stored rows of e^{beta m_i . z + b_i})``."""
    z = z.double()
    total = torch.full_like(z[:, 0], -math.inf)
    rows = _active(patterns, log_prior)
    if not rows:
        return z.new_zeros(len(z))
    for m, b in rows:
        total = torch.logaddexp(total, beta * (z * m).sum(-1) + b)
    return (total - math.log(len(rows))) / beta


def hopfield_energy(
    z: Float[Tensor, "N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "N"]:
    """``-lse(beta, M z) + |z|^2 / 2 + log(K) / beta + max |m|^2 / 2``."""
    norms = [m.square().sum() for m, _ in _active(patterns, log_prior)]
    largest = torch.stack(norms).amax() if norms else 0.0
    return z.double().square().sum(-1) / 2 - hopfield_potential(z, patterns, beta, log_prior) + largest / 2


def pattern_margins(
    patterns: Float[Tensor, "K D"], beta: float, log_prior: Float[Tensor, "K"] | None = None
) -> Float[Tensor, "K"]:
    """``beta m_i . m_i + b_i - log(sum over j != i of e^{beta m_i . m_j + b_j})``; infinite without others."""
    rows = patterns.double()
    prior = torch.zeros(len(rows)) if log_prior is None else log_prior.double()
    margins = torch.full((len(rows),), math.inf, dtype=torch.float64)
    for i, m in enumerate(rows):
        if prior[i] > -math.inf:
            others = torch.tensor(-math.inf, dtype=torch.float64)
            for j, n in enumerate(rows):
                if j != i:
                    others = torch.logaddexp(others, beta * (m * n).sum() + prior[j])
            margins[i] = beta * (m * m).sum() + prior[i] - others
    return margins
