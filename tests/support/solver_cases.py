"""Small problems with everything a solver is promised: one quadratic, one with patterns."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helmholtz.solvers import AbstractProblem


@dataclass(frozen=True)
class Quadratic(AbstractProblem):
    """``E = |z|^2/2 - u.z - z.Az/2`` with symmetric ``A >= 0``, so that ``f = u + Az``."""

    u: Tensor
    a: Tensor

    def map(self, z):
        return self.u + z @ self.a

    def map_and_energy(self, z):
        f = self.map(z)
        return f, (z.square() / 2 - z * (self.u + f) / 2).sum(-1)

    def jvp(self, z, v):
        return v @ self.a

    def take(self, rows):
        return replace(self, u=self.u[rows])


@dataclass(frozen=True)
class Patterns(AbstractProblem):
    """``E = |z|^2/2 - u.z - (strength/beta) log sum exp(beta M z)``: ``f = u + strength M^T softmax(beta M z)``."""

    u: Tensor
    patterns: Tensor
    strength: Tensor
    beta: float

    def map(self, z):
        return self.map_and_energy(z)[0]

    def map_and_energy(self, z):
        scores = self.beta * z @ self.patterns.T
        f = self.u + self.strength * scores.softmax(-1) @ self.patterns
        energy = (z.square() / 2 - self.u * z).sum(-1) - self.strength / self.beta * scores.logsumexp(-1)
        return f, energy

    def jvp(self, z, v):
        weights = (self.beta * z @ self.patterns.T).softmax(-1)
        image = v @ self.patterns.T
        image = weights * (image - (weights * image).sum(-1, keepdim=True))
        return self.strength * self.beta * image @ self.patterns

    def take(self, rows):
        return replace(self, u=self.u[rows])


def quadratic(n, width, *, largest=0.8, dtype=torch.float64):
    """Eigenvalues of ``A`` evenly between 0 and ``largest``."""
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    a = (basis * torch.linspace(0, largest, width, dtype=torch.float64)) @ basis.T
    return Quadratic(torch.randn(n, width, dtype=torch.float64).to(dtype), a.to(dtype))


def random_patterns(n, width, n_patterns, *, contraction=0.9, beta=2.0, dtype=torch.float64):
    """Patterns of norm ``R = D^(1/4)``; ``strength * beta * R^2`` is ``contraction``."""
    radius = width**0.25
    patterns = radius * torch.nn.functional.normalize(
        torch.randn(n_patterns, width, dtype=torch.float64), dim=1
    )
    u = torch.randn(n, width, dtype=torch.float64) * radius / width**0.5
    strength = torch.tensor(contraction / (beta * radius**2))
    return Patterns(u.to(dtype), patterns.to(dtype), strength.to(dtype), beta)


def antipodal(n, width, *, contraction=0.9, dtype=torch.float64):
    """Two opposite patterns and queries on the ridge between them, where the map is slowest: ``(problem, start)``."""
    radius = width**0.25
    pattern = torch.nn.functional.normalize(torch.randn(1, width, dtype=torch.float64), dim=1) * radius
    across = torch.randn(n, width, dtype=torch.float64)
    across -= across @ pattern.T @ pattern / radius**2
    u = radius * torch.nn.functional.normalize(across, dim=1)
    start = u + pattern * torch.linspace(0.1, 0.5, n, dtype=torch.float64).unsqueeze(1)
    strength = torch.tensor(contraction / (2.0 * radius**2))
    problem = Patterns(u.to(dtype), torch.cat([pattern, -pattern]).to(dtype), strength.to(dtype), 2.0)
    return problem, start.to(dtype)
