"""Test of the energy above the equilibrium as a Lyapunov function of plain steps."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.convergence_case import AbstractTest, Check, ValidationCase
from helmholtz.evals.equilibria import equilibrium_ball, in_double, points_in_ball, random_directions
from helmholtz.evals.landscape_case import EXACT
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.solvers import solve
from helmholtz.solvers.spectrum import local_lipschitz

EXACTLY = replace(EXACT, on_nonconvergence="ignore")
STEPS = 60
DIGITS = 1e-11
"""Differences of energies, relative to ``1 + |E|``, below which float64 shows rounding and no more."""
FAR, NEAR = 0.1, 0.05
"""Disturbances in norms of the patterns, of a contraction and of a model that may have several equilibria."""
ASYMPTOTIC = 0.02
"""Distance, in norms of the patterns, within which the Jacobian is that of the equilibrium."""
SLACK = 0.05
"""What it may differ by there."""


@final
@dataclass(frozen=True, slots=True)
class LyapunovTest(AbstractTest):
    r"""Whether :math:`V = E - E(z^*)` is a Lyapunov function of plain steps, in float64.

    Positive away from the equilibrium, falling at each step, by the right factor near the equilibrium, and in the
    contractive regime at most :math:`|f(z) - z|^2 / (2 (1 - L))`.
    """

    lyapunov_rate: float
    """Part of the starts for which all of this holds at every step."""
    positive_rate: float
    decreasing_rate: float
    ratio_rate: float
    bound_rate: float
    worst_ratio: float
    """Largest ``V_{k+1} / V_k`` near an equilibrium, less the local Lipschitz constant there."""
    tested_starts: int

    @property
    def is_lyapunov(self) -> bool:
        return self.passed

    def verdicts(self) -> dict[str, bool]:
        return {"is_lyapunov": self.is_lyapunov}

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("starts where V is positive", self.positive_rate, ">=", 1),
            Check("starts where V falls", self.decreasing_rate, ">=", 1),
            Check("starts where fast enough", self.ratio_rate, ">=", 1),
            Check("starts where bounded", self.bound_rate, ">=", 1),
            Check("all of these", self.lyapunov_rate, ">=", 1),
            Check("starts tested", self.tested_starts, ">", 0),
        )


@final
@dataclass(frozen=True, slots=True)
class _Trace:
    """Plain steps of ``M`` starts."""

    above: Float[Tensor, "k M"]
    """``E(z_k) - E(z*)``."""
    residual: Float[Tensor, "k M"]
    """Squared."""
    distance: Float[Tensor, "k M"]
    """From the equilibrium."""
    digits: Float[Tensor, "M"]
    """What rounding makes of a difference of energies."""


def check_lyapunov(case: ValidationCase) -> LyapunovTest:
    """From a disturbance of each equilibrium and, in a contraction, from anywhere in the ball."""
    generator = case.generator(7)
    rest = solve(in_double(case.problem), case.z.double(), EXACTLY)
    rows = rest.converged.nonzero().flatten()
    if not len(rows):
        return LyapunovTest(0.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0)
    problem, z = in_double(case.problem).take(rows), rest.value[rows]
    size = (FAR if case.contractive else NEAR) * case.radius
    starts = [z + size * random_directions(z, generator=generator)]
    if case.contractive:
        starts.append(points_in_ball(torch.zeros_like(z), equilibrium_ball(problem), generator=generator))
    several = torch.arange(len(z)).repeat(len(starts))
    local = local_lipschitz(problem, z, steps=100, generator=generator)[several]
    trace = _trace(problem.take(several), torch.cat(starts), z[several])
    return _judge(case, trace, local)


def _trace(problem: TokenProblem, z: Float[Tensor, "M D"], rest: Float[Tensor, "M D"]) -> _Trace:
    lowest = problem.energy(rest)
    above, residual, distance = [], [], []
    for _ in range(STEPS):
        mapped, energy = problem.map_and_energy(z)
        above.append(energy - lowest)
        residual.append((mapped - z).square().sum(-1))
        distance.append((z - rest).norm(dim=-1))
        z = mapped
    return _Trace(
        torch.stack(above), torch.stack(residual), torch.stack(distance), DIGITS * (1 + lowest.abs())
    )


def _judge(case: ValidationCase, trace: _Trace, local: Float[Tensor, "M"]) -> LyapunovTest:
    above, digits, radius = trace.above, trace.digits, case.radius
    falls = (above[1:] < above[:-1]) | (trace.residual[:-1] <= digits)
    # a start that leaves for another equilibrium is not near this one
    returned = trace.distance[-1] <= FAR * radius
    off = trace.distance > 1e-3 * radius
    positive = torch.where(off, above > 0, above >= -digits) | ~(returned | case.contractive)
    near = (trace.distance[:-1] <= ASYMPTOTIC * radius) & (above[:-1] > 100 * digits)
    excess = torch.where(near, above[1:] / above[:-1] - local, -1.0)
    bounded = torch.ones_like(falls)
    if case.contractive:
        room = 2 * max(1 - case.certificate, 0.0)
        bounded = room * above <= trace.residual + room * digits
    held = [x.all(0) for x in (positive, falls, excess <= SLACK, bounded)]
    rates = [x.double().mean().item() for x in held]
    return LyapunovTest(
        lyapunov_rate=torch.stack(held).all(0).double().mean().item(),
        positive_rate=rates[0],
        decreasing_rate=rates[1],
        ratio_rate=rates[2],
        bound_rate=rates[3],
        worst_ratio=excess.max().item(),
        tested_starts=above.shape[1],
    )
