"""The modern Hopfield energy over stored patterns, its retrieval step and when that finds a pattern."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check_integer, check_positive
from helmholtz.ops._compute import compute_dtype, full_precision

MARGIN_SCORES = 1 << 22
"""Scores of ``pattern_margins`` in memory at once."""


def pattern_scores(
    z: Float[Tensor, "*N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "*N K"]:
    r""":math:`\beta\, m_i \cdot z + b_i`, in at least float32 also under autocast."""
    check_positive("beta", beta)
    wide = compute_dtype(z, patterns, log_prior)
    with full_precision(z.device):
        scores = beta * (z.to(wide) @ patterns.to(wide).T)
    return scores if log_prior is None else scores + log_prior.to(wide)


def weights_of_scores(
    scores: Float[Tensor, "*N K"], log_prior: Float[Tensor, "K"] | None = None
) -> Float[Tensor, "*N K"]:
    """Softmax of ``pattern_scores``; 0 everywhere if every row is empty."""
    if log_prior is None:
        return scores.softmax(-1)
    nothing = torch.isneginf(log_prior).all()
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def potential_of_scores(
    scores: Float[Tensor, "*N K"], beta: float, log_prior: Float[Tensor, "K"] | None = None
) -> Float[Tensor, "*N"]:
    """``(log sum exp - log of active rows) / beta`` of ``pattern_scores``; 0 if every row is empty."""
    n_patterns = scores.shape[-1]
    if n_patterns == 0:
        return scores.sum(-1)
    if log_prior is None:
        return (scores.logsumexp(-1) - math.log(n_patterns)) / beta
    active = (~torch.isneginf(log_prior)).sum()
    total = scores.masked_fill(active == 0, 0).logsumexp(-1)
    return ((total - active.clamp(min=1).to(total.dtype).log()) / beta).masked_fill(active == 0, 0)


def hopfield_weights(
    z: Float[Tensor, "*N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "*N K"]:
    r"""How much of each pattern a state retrieves, :math:`p = \mathrm{softmax}(\beta M z + b)`.

    Args:
        beta: inverse temperature, in nats per unit of a squared pattern.
        log_prior: :math:`b`: 0, or minus infinity for a row of the memory that is empty. None means 0.

    Returns: a distribution over the rows that are not empty; 0 everywhere if all are.
    Raises: ValueError unless ``beta`` is finite and positive.
    Source: Ramsauer et al., "Hopfield Networks is All You Need", 2020, eq. 3.
    Reference: ``helmholtz.reference.hopfield_weights``.
    """
    return weights_of_scores(pattern_scores(z, patterns, beta, log_prior), log_prior).to(z.dtype)


def hopfield_retrieve(
    z: Float[Tensor, "*N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "*N D"]:
    r"""One retrieval step, :math:`M^\top \mathrm{softmax}(\beta M z + b)`: the gradient of ``hopfield_potential``.

    It is the concave-convex step of ``hopfield_energy``, which it lowers by at least half of the squared step.

    Returns: a point in the convex hull of the patterns; 0 if every row is empty.
    Source: Ramsauer et al. 2020, eq. 3. Reference: ``helmholtz.reference.hopfield_retrieve``.
    """
    weights = weights_of_scores(pattern_scores(z, patterns, beta, log_prior), log_prior)
    with full_precision(z.device):
        return (weights @ patterns.to(weights.dtype)).to(z.dtype)


def hopfield_potential(
    z: Float[Tensor, "*N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "*N"]:
    r"""The convex potential of the patterns, 0 at ``z = 0`` and for a memory whose every row is empty.

    .. math:: \phi(z) = \beta^{-1} \Big( \log \sum_i e^{\beta m_i \cdot z + b_i} - \log K_{\mathrm{active}} \Big)

    Returns: in at least float32; between the mean and the largest of :math:`m_i \cdot z` over active rows.
    Source: Ramsauer et al. 2020, eq. 2. Reference: ``helmholtz.reference.hopfield_potential``.
    """
    return potential_of_scores(pattern_scores(z, patterns, beta, log_prior), beta, log_prior)


def hopfield_energy(
    z: Float[Tensor, "*N D"],
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
) -> Float[Tensor, "*N"]:
    r""":math:`E(z) = \tfrac12 |z|^2 - \phi(z) + \tfrac12 \max_i |m_i|^2 \ge 0`, the maximum over active rows.

    Returns: in at least float32, with the rounding errors of the squares: a 0 may come out slightly below 0.
    Source: Ramsauer et al. 2020, eq. 2. Reference: ``helmholtz.reference.hopfield_energy``.
    """
    potential = hopfield_potential(z, patterns, beta, log_prior)
    squares = patterns.to(potential.dtype).square().sum(-1)
    if log_prior is not None:
        squares = squares.masked_fill(torch.isneginf(log_prior), 0)
    largest = squares.amax() if len(squares) else squares.sum()
    return (z.to(potential.dtype).square().sum(-1) + largest) / 2 - potential


def pattern_margins(
    patterns: Float[Tensor, "K D"],
    beta: float,
    log_prior: Float[Tensor, "K"] | None = None,
    *,
    chosen: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, "n"]:
    r"""By how many nats each pattern outweighs all others together at its own place.

    .. math:: \ell_i = \beta\, m_i \cdot m_i + b_i - \log \sum_{j \ne i} e^{\beta m_i \cdot m_j + b_j}
              = \log \frac{p_i(m_i)}{1 - p_i(m_i)}

    With patterns of one norm it only grows with ``beta``, and ``beta`` and the square of the norm count alike. At
    :math:`1 + \ln 4 \beta R^2` and above retrieval from the pattern stays within :math:`1 / (2 \beta R)` of it; below
    about 3 two or more patterns share an equilibrium.

    Args:
        chosen: indices of the patterns that are asked about; None means all.

    Returns: in at least float32; infinite for a pattern without others, and for a row that is empty.
    Cost: K D per chosen pattern.
    Source: Ramsauer et al. 2020, definition 1 and theorem 4 (separation of patterns); docs/math/equilibrium.md, eq. 11.
    Reference: ``helmholtz.reference.pattern_margins``.
    """
    chosen = torch.arange(len(patterns), device=patterns.device) if chosen is None else chosen
    margins = [patterns.new_zeros(0, dtype=compute_dtype(patterns, log_prior))]
    for rows in chosen.split(max(1, MARGIN_SCORES // max(1, len(patterns)))):
        scores = pattern_scores(patterns[rows], patterns, beta, log_prior)
        own = scores.gather(-1, rows.unsqueeze(-1))
        others = scores.scatter(-1, rows.unsqueeze(-1), -torch.inf).logsumexp(-1)
        margins.append(torch.where(own.isneginf(), torch.inf, own).squeeze(-1) - others)
    return torch.cat(margins)


def retrieval_margin(d_model: int, n_patterns: int, beta: float, radius: float) -> float:
    r"""The margin that a pattern among ``n_patterns`` of random directions will have (``pattern_margins``).

    .. math:: \beta R^2 (1 - c) - \ln (K - 1) - \tfrac D2 \ln (1 - c^2), \qquad
              c = \min\Big( \frac{\sqrt{D^2 + 4 (\beta R^2)^2} - D}{2 \beta R^2},\; \sqrt{1 - (K - 1)^{-2/D}} \Big)

    :math:`c` is the cosine of the other patterns that weigh most, those with the largest product of their number,
    :math:`(K - 1) (1 - c^2)^{D/2}`, and their weight, :math:`e^{\beta R^2 c}`, but no closer than the closest one.
    Directions that are not random (clusters, a common mean) have a smaller margin: ask ``pattern_margins`` of the
    patterns themselves.

    Args:
        radius: the norm :math:`R` of the patterns.

    Returns: nats; infinite for a single pattern.
    Accuracy: at most 0.3 nats above the median of drawn patterns and 0.3 nats or 15 % below it, the latter where the
        closest one weighs most (``tests/ops/test_hopfield.py``).
    Source: docs/math/equilibrium.md, eq. 13.
    """
    check_integer("d_model", d_model)
    check_integer("n_patterns", n_patterns)
    check_positive("beta", beta)
    check_positive("radius", radius)
    if n_patterns == 1:
        return math.inf
    own, log_others = beta * radius**2, math.log(n_patterns - 1)
    heaviest = (
        2 * own / (math.hypot(d_model, 2 * own) + d_model)
    )  # of the formula above, without its cancellation
    cosine = min(heaviest, math.sqrt(-math.expm1(-2 * log_others / d_model)))
    return own * (1 - cosine) - log_others - d_model / 2 * math.log1p(-(cosine**2))
