"""The modern Hopfield energy over stored patterns, its retrieval step and when that finds a pattern."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check_integer, check_positive
from helmholtz.ops._compute import compute_dtype, full_precision


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


def retrieval_margin(d_model: int, n_patterns: int, beta: float, radius: float) -> float:
    r"""By how many nats a stored pattern outweighs all others at its own place, for random directions.

    .. math:: \beta R^2 - \frac{(\beta R^2)^2}{2 D} - \ln K

    The others' scores are close to normal with variance :math:`(\beta R^2)^2 / D`, so that their exponentials sum up
    to :math:`K e^{(\beta R^2)^2 / 2D}` on average. Below about 3 nats retrieval is unreliable, near 0 it ends in the
    mean of all patterns. Directions that are not random (clusters) need more.

    Args:
        radius: the norm :math:`R` of the patterns.
    """
    check_integer("d_model", d_model)
    check_integer("n_patterns", n_patterns)
    check_positive("beta", beta)
    check_positive("radius", radius)
    own = beta * radius**2
    return own - own**2 / (2 * d_model) - math.log(n_patterns)
