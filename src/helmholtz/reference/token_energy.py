"""The energy of a token's state, its map and Jacobian in float64, from the formulas; the spectral norm's bound."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.reference.hopfield import hopfield_potential, hopfield_retrieve, hopfield_weights

PANELS = 128
ROOT_1, ROOT_2 = (math.sqrt(3 / 7 - sign * 2 / 7 * math.sqrt(6 / 5)) for sign in (1, -1))
WEIGHT_1, WEIGHT_2 = ((18 + sign * math.sqrt(30)) / 72 for sign in (1, -1))
GAUSS_LEGENDRE = ((-ROOT_2, WEIGHT_2), (-ROOT_1, WEIGHT_1), (ROOT_1, WEIGHT_1), (ROOT_2, WEIGHT_2))


def _quotient(a: Tensor, delta: Tensor, w: Tensor) -> Tensor:
    """``[log cosh(a + delta w) - log cosh a] / delta`` as ``w`` times the mean of ``tanh(a + s delta w)`` over
    ``0 < s < 1``: panels of four nodes, exact in float64 for ``|delta w| < 10``."""
    nodes = [(panel + (1 + node) / 2) / PANELS for panel in range(PANELS) for node, _ in GAUSS_LEGENDRE]
    weights = torch.tensor([weight / PANELS for _, weight in GAUSS_LEGENDRE] * PANELS, dtype=torch.float64)
    s = torch.tensor(nodes, dtype=torch.float64).unsqueeze(1)
    mean = weights @ torch.tanh(a + s * delta * w)
    return w * mean


def _doubles(values: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in values]


def token_energy(z: Float[Tensor, "N D"], field: Any, parameters: Any) -> Float[Tensor, "N"]:
    """``|z|^2/2 - u.z - kappa sum_e gate_e q_e - strength phi(z)``; fields and parameters in the order of the op's."""
    u, a, gate, delta = _doubles(field)
    weight, patterns, log_prior, kappa, strength, beta = _doubles(parameters)
    z = z.double()
    energy = z.square().sum(-1) / 2 - (u * z).sum(-1)
    for e, row in enumerate(weight.unbind(0)):
        energy = energy - kappa * gate[:, e] * _quotient(a[:, e], delta[:, e], z @ row)
    return energy - strength * hopfield_potential(z, patterns, beta, log_prior)


def token_map(z: Float[Tensor, "N D"], field: Any, parameters: Any) -> Float[Tensor, "N D"]:
    """``u + kappa sum_e W_e gate_e tanh(a_e + delta_e W_e.z) + strength sum_i p_i m_i``."""
    u, a, gate, delta = _doubles(field)
    weight, patterns, log_prior, kappa, strength, beta = _doubles(parameters)
    z = z.double()
    out = u + strength * hopfield_retrieve(z, patterns, beta, log_prior)
    for e, row in enumerate(weight.unbind(0)):
        emitted = gate[:, e] * torch.tanh(a[:, e] + delta[:, e] * (z @ row))
        out = out + kappa * emitted.unsqueeze(-1) * row
    return out


def token_jvp(
    z: Float[Tensor, "N D"], v: Float[Tensor, "N D"], field: Any, parameters: Any
) -> Float[Tensor, "N D"]:
    """Each row's Jacobian as a matrix, times its row of ``v``."""
    _, a, gate, delta = _doubles(field)
    weight, patterns, log_prior, kappa, strength, beta = _doubles(parameters)
    z, v = z.double(), v.double()
    p = hopfield_weights(z, patterns, beta, log_prior)
    out = []
    for n in range(len(z)):
        slope = torch.cosh(a[n] + delta[n] * (weight @ z[n])) ** -2
        covariance = torch.diag(p[n]) - torch.outer(p[n], p[n])
        jacobian = kappa * weight.T @ torch.diag(gate[n] * delta[n] * slope) @ weight
        jacobian = jacobian + strength * beta * patterns.T @ covariance @ patterns
        out.append(jacobian @ v[n])
    return torch.stack(out) if out else torch.zeros_like(z)


def contraction_certificate(field: Any, parameters: Any) -> float:
    """``kappa max(gate delta) |W|^2 + strength beta min(max |m|^2, max |m - m'|^2 / 4)``."""
    _, _, gate, delta = _doubles(field)
    weight, patterns, log_prior, kappa, strength, beta = _doubles(parameters)
    stored = [m for i, m in enumerate(patterns) if log_prior is None or log_prior[i] > -math.inf]
    spread = 0.0
    if stored:
        radius = max(float(m @ m) for m in stored)
        spread = min(radius, max(float((m - other) @ (m - other)) for m in stored for other in stored) / 4)
    largest = float(torch.linalg.svdvals(weight)[0])
    return float(kappa) * float((gate * delta).max()) * largest**2 + float(strength) * beta * spread


def spectral_norm_bound(weight: Float[Tensor, "E D"], *, squarings: int = 6) -> Float[Tensor, "1"]:
    """The Schatten norm ``(sum_i s_i^{2p})^{1/2p}`` of the singular values, ``p = 2^{squarings + 1}``."""
    values = torch.linalg.svdvals(weight.double())
    if values[0] == 0:
        return values[:1] * 0
    power = 2.0 ** (squarings + 2)
    return (values[0] * (values / values[0]).pow(power).sum().pow(1 / power)).view(1)
