"""Plain associative recall: retrieval steps from a query until they come to an end."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._once import is_traced
from helmholtz.ops._compute import full_precision
from helmholtz.ops.hopfield import (
    hopfield_retrieve,
    hopfield_weights,
    pattern_scores,
    potential_of_scores,
    weights_of_scores,
)
from helmholtz.solvers import AbstractAdjoint, AbstractProblem, Implicit, Solution, SolverConfig, Unrolled

RECALL = SolverConfig(mode="picard", max_steps=100, rtol=1e-4, energy_rtol=1e-4, on_nonconvergence="ignore")
"""The update as it is, which alone decides in which pattern's basin a query lies."""


@final
@dataclass(frozen=True, slots=True)
class AssociativeProblem(AbstractProblem):
    r"""Plain recall: :math:`E(z) = \tfrac12 |z|^2 - \phi(z)` and its map, one retrieval step. Rows share it all."""

    patterns: Float[Tensor, "K D"]
    beta: float
    log_prior: Float[Tensor, "K"] | None = None

    def map(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return hopfield_retrieve(z, self.patterns, self.beta, self.log_prior)

    def map_and_energy(self, z: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
        scores = pattern_scores(z, self.patterns, self.beta, self.log_prior)
        weights = weights_of_scores(scores, self.log_prior)
        with full_precision(z.device):
            f = (weights @ self.patterns.to(weights.dtype)).to(z.dtype)
        potential = potential_of_scores(scores, self.beta, self.log_prior)
        return f, z.to(scores.dtype).square().sum(-1) / 2 - potential

    def jvp(self, z: Float[Tensor, "N D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        weights = hopfield_weights(z, self.patterns, self.beta, self.log_prior)
        with full_precision(z.device):
            projected = v @ self.patterns.to(v.dtype).T
            centred = projected - (weights * projected).sum(-1, keepdim=True)
            return self.beta * (weights * centred) @ self.patterns.to(v.dtype)

    def take(self, rows: Int[Tensor, "n"]) -> "AssociativeProblem":
        return self


def with_gradient(problem: AssociativeProblem, solution: Solution, solver: SolverConfig) -> Solution:
    """The same value and energy, with a graph if one is wanted."""
    tracked = problem.patterns.requires_grad or solution.start.requires_grad or is_traced()
    if not (tracked and torch.is_grad_enabled()):
        return solution
    plain = solver.mode == "picard" and solver.damping == 1
    adjoint: AbstractAdjoint = Unrolled() if plain else Implicit(on_nonconvergence="ignore")
    z = adjoint.attach(problem, solution)
    value = solution.value + (z - z.detach())
    return replace(solution, value=value, energy=problem.map_and_energy(value)[1])
