r"""The energy of one token's state, the map that descends it and its Jacobian.

.. math:: E(z) = \tfrac12 |z|^2 - u \cdot z - \kappa \sum_e \frac{\gamma_e}{\delta_e}
          \big[ \log\cosh(a_e + \delta_e (Wz)_e) - \log\cosh a_e \big] - \lambda\, \phi(z)

with the potential :math:`\phi` of ``ops.hopfield_potential``. Rows are independent of each other. Everything that is
subtracted from :math:`\tfrac12 |z|^2` is convex for :math:`\kappa, \gamma, \delta, \lambda \ge 0`, so the map
:math:`f(z) = z - \nabla E(z)` is the concave-convex step: :math:`E(f(z)) \le E(z) - \tfrac12 |f(z) - z|^2` for every
value of the parameters, and the Jacobian of :math:`f` is symmetric and positive semi-definite.

:math:`a + \delta (Wz)` is a bounded surrogate of what one step of a state space model would emit if it were driven by
the candidate ``z``: the past's part ``a``, and the gain ``delta`` of the step, which in the model itself is unbounded.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check_positive
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._logcosh import log_cosh_quotient
from helmholtz.ops.hopfield import potential_of_scores, weights_of_scores

DISTANCE_ROWS = 1024
"""Patterns whose distances to all others are held at once."""


class TokenField(NamedTuple):
    """What the context makes of each token's energy; a row per token."""

    u: Float[Tensor, "N D"]
    """Input injection: the equilibrium where nothing else acts."""
    a: Float[Tensor, "N E"]
    """What the state space model would emit from its past alone."""
    gate: Float[Tensor, "N E"]
    """At least 0."""
    delta: Float[Tensor, "N E"]
    """Gain of the candidate state in the step; at least 0, and 0 is allowed."""


class EnergyParameters(NamedTuple):
    """What all tokens share."""

    weight: Float[Tensor, "E D"]
    patterns: Float[Tensor, "K D"]
    log_prior: Float[Tensor, "K"] | None
    """0, or minus infinity for an empty row; None means 0."""
    kappa: Float[Tensor, "1"]
    """At least 0."""
    strength: Float[Tensor, "1"]
    """The factor of the potential, at least 0."""
    beta: float


class EnergyComponents(NamedTuple):
    """Summands of ``token_energy``."""

    quadratic: Float[Tensor, "N"]
    field: Float[Tensor, "N"]
    mamba: Float[Tensor, "N"]
    hopfield: Float[Tensor, "N"]


class _Products(NamedTuple):
    """What energy, map and Jacobian have in common, in the compute dtype."""

    z: Tensor
    field: TokenField
    weight: Tensor
    patterns: Tensor
    log_prior: Tensor | None
    kappa: Tensor
    strength: Tensor
    beta: float
    drive: Tensor  # W z
    overlaps: Tensor  # M z

    def scores(self) -> Tensor:
        """``beta M z + b``."""
        scores = self.beta * self.overlaps
        return scores if self.log_prior is None else scores + self.log_prior


def _products(z: Tensor, field: TokenField, parameters: EnergyParameters) -> _Products:
    weight, patterns, log_prior, kappa, strength, beta = parameters
    check_positive("beta", beta)
    wide = compute_dtype(z, *field, weight, patterns, log_prior, kappa, strength)
    z, weight, patterns, kappa, strength = (x.to(wide) for x in (z, weight, patterns, kappa, strength))
    log_prior = None if log_prior is None else log_prior.to(wide)
    field = TokenField(*(x.to(wide) for x in field))
    drive, overlaps = z @ weight.T, z @ patterns.T
    return _Products(z, field, weight, patterns, log_prior, kappa, strength, beta, drive, overlaps)


def _by_kernel(p: _Products) -> tuple[Tensor, Tensor, Tensor] | None:
    """``kappa gamma tanh``, ``strength softmax`` and the energy; None where the kernel is not used. It has no gradient
    and a solver asks for none."""
    given = (p.z, *p.field, p.drive, p.overlaps, p.log_prior, p.kappa, p.strength)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*given, p.weight, p.patterns)
    ):
        return None
    if not kernels.usable("token_energy", *given):
        return None
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.helmholtz.token_energy(*given, p.beta)
    return found


def _components(p: _Products) -> EnergyComponents:
    quotient = log_cosh_quotient(p.field.a, p.field.delta, p.drive)
    return EnergyComponents(
        quadratic=p.z.square().sum(-1) / 2,
        field=-(p.field.u * p.z).sum(-1),
        mamba=-p.kappa * (p.field.gate * quotient).sum(-1),
        hopfield=-p.strength * potential_of_scores(p.scores(), p.beta, p.log_prior),
    )


def _energy(p: _Products) -> Tensor:
    quadratic, linear, mamba, hopfield = _components(p)
    return quadratic + linear + mamba + hopfield


def _map(p: _Products) -> Tensor:
    emitted = p.field.gate * torch.tanh(p.field.a + p.field.delta * p.drive)
    retrieved = weights_of_scores(p.scores(), p.log_prior) @ p.patterns
    return p.field.u + p.kappa * (emitted @ p.weight) + p.strength * retrieved


def _joined(p: _Products, emitted: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(p.field.u, emitted, p.weight).addmm_(weights, p.patterns)


def energy_components(
    z: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters
) -> EnergyComponents:
    """The summands of the energy, in at least float32: quadratic, field, mamba, hopfield."""
    with full_precision(z.device):
        return _components(_products(z, field, parameters))


def token_energy(
    z: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters
) -> Float[Tensor, "N"]:
    """Energy of every row (see the module), in at least float32; differentiable in everything.

    Accuracy: a few roundings of its largest summand. The quotient by delta is never formed, see
        ``log_cosh_quotient``: its error does not grow as delta shrinks.
    Raises: ValueError unless ``beta`` is finite and positive. Signs of the other parameters are the caller's.
    Reference: ``helmholtz.reference.token_energy``.
    """
    with full_precision(z.device):
        products = _products(z, field, parameters)
        found = _by_kernel(products)
        return _energy(products) if found is None else found[2]


def token_map(
    z: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters
) -> Float[Tensor, "N D"]:
    r"""One step of descent, :math:`f(z) = z - \nabla E(z)`; its fixed points are the critical points of ``E``.

    .. math:: f(z) = u + \kappa W^\top \big( \gamma \odot \tanh(a + \delta \odot Wz) \big)
              + \lambda M^\top \mathrm{softmax}(\beta M z + b)

    Computed in at least float32, returned in the dtype of ``z``. Reference: ``helmholtz.reference.token_map``.
    """
    with full_precision(z.device):
        products = _products(z, field, parameters)
        found = _by_kernel(products)
        return (_map(products) if found is None else _joined(products, *found[:2])).to(z.dtype)


def token_map_and_energy(
    z: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
    """``token_map`` and ``token_energy``, with the products :math:`W z` and :math:`M z` formed once."""
    with full_precision(z.device):
        products = _products(z, field, parameters)
        found = _by_kernel(products)
        if found is None:
            return _map(products).to(z.dtype), _energy(products)
        emitted, weights, energy = found
        return _joined(products, emitted, weights).to(z.dtype), energy


class TokenJacobian(NamedTuple):
    r"""The Jacobian of ``token_map``, row by row; symmetric and positive semi-definite.

    .. math:: J = \kappa W^\top \mathrm{diag}\big( \gamma \delta \,\mathrm{sech}^2(a + \delta W z) \big) W
              + \lambda \beta M^\top \big( \mathrm{diag}(p) - p p^\top \big) M
    """

    slopes: Float[Tensor, "N E"]
    """With kappa."""
    weights: Float[Tensor, "N K"]
    """Retrieval weights ``p``."""
    weight: Float[Tensor, "E D"]
    patterns: Float[Tensor, "K D"]
    steepness: Float[Tensor, "1"]
    """Strength times beta."""

    def product(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """``J v``, which is also the transposed product; costs what the map costs."""
        with full_precision(v.device):
            wide = v.to(self.slopes.dtype)
            emitted = (self.slopes * (wide @ self.weight.T)) @ self.weight
            overlaps = wide @ self.patterns.T
            mean = (self.weights * overlaps).sum(-1, keepdim=True)
            retrieved = (self.weights * (overlaps - mean)) @ self.patterns
            return (emitted + self.steepness * retrieved).to(v.dtype)

    def take(self, rows: Int[Tensor, "n"]) -> "TokenJacobian":
        """Those of some rows."""
        return self._replace(slopes=self.slopes[rows], weights=self.weights[rows])


def token_jacobian(z: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters) -> TokenJacobian:
    """The Jacobian of ``token_map`` at ``z``, in at least float32, for any number of products."""
    with full_precision(z.device):
        p = _products(z, field, parameters)
        slope = 1 - torch.tanh(p.field.a + p.field.delta * p.drive).square()
        slopes = p.kappa * p.field.gate * p.field.delta * slope
        weights = weights_of_scores(p.scores(), p.log_prior)
        return TokenJacobian(slopes, weights, p.weight, p.patterns, p.strength * p.beta)


def token_jvp(
    z: Float[Tensor, "N D"], v: Float[Tensor, "N D"], field: TokenField, parameters: EnergyParameters
) -> Float[Tensor, "N D"]:
    """The Jacobian of ``token_map`` at ``z`` (see ``TokenJacobian``) times ``v``, row by row; in the dtype of ``z``.

    Costs what the map costs, and half of it for the Jacobian. Reference: ``helmholtz.reference.token_jvp``.
    """
    return token_jacobian(z, field, parameters).product(v).to(z.dtype)


@torch.no_grad()
def contraction_certificate(field: TokenField, parameters: EnergyParameters) -> float:
    r"""A bound of :math:`|J(z)|_2` over all ``z`` and all rows of the field, in float64.

    .. math:: L = \kappa\, \max_{n, e}(\gamma_{ne} \delta_{ne})\, |W|_2^2
              + \lambda \beta \min\big( \max_i |m_i|^2, \tfrac14 \max_{ij} |m_i - m_j|^2 \big)

    over active patterns: ``p`` cannot spread them further along any direction (Popoviciu). Below 1 the map is a
    contraction: the equilibrium :math:`z^*` is unique, :math:`|z - z^*| \le |f(z) - z| / (1 - L)`, and ``E`` is
    :math:`(1 - L)`-strongly convex.

    Cost: a singular value decomposition of the weight, and all distances between patterns.
    Reference: ``helmholtz.reference.contraction_certificate``.
    """
    active = parameters.patterns.double()
    if parameters.log_prior is not None:
        active = active[~torch.isneginf(parameters.log_prior)]
    spread = 0.0
    if len(active) > 1:
        rows = active.split(DISTANCE_ROWS)
        squares = active.square().sum(-1)
        # the largest distance has no cancellation in this form
        distances = [part.square().sum(-1, keepdim=True) + squares - 2 * part @ active.T for part in rows]
        diameter = max(part.amax().item() for part in distances)
        spread = min(squares.amax().item(), diameter / 4)
    gain = (field.gate * field.delta).double().amax().item() if field.gate.numel() else 0.0
    norm = torch.linalg.matrix_norm(parameters.weight.double(), 2).item()
    kappa, strength = parameters.kappa.double().item(), parameters.strength.double().item()
    return kappa * gain * norm**2 + strength * parameters.beta * spread
