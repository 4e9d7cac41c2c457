"""Test of the energy above the equilibrium as a Lyapunov function of plain steps."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.convergence_case import FAR, AbstractTest, Check, ValidationCase, silent
from helmholtz.evals.equilibria import in_double, points_in_ball, random_directions
from helmholtz.evals.landscape_case import EXACT
from helmholtz.solvers import solve
from helmholtz.solvers.spectrum import local_lipschitz

STEPS = 60
DIGITS = 1e-11
"""Differences of energies, relative to ``1 + |E|``, below which float64 shows rounding and no more."""
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

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("starts where V is positive", self.positive_rate, ">=", 1),
            Check("starts where V falls", self.decreasing_rate, ">=", 1),
            Check("starts where fast enough", self.ratio_rate, ">=", 1),
            Check("starts where bounded", self.bound_rate, ">=", 1),
            Check("all of these", self.lyapunov_rate, ">=", 1),
            Check("starts tested", self.tested_starts, ">", 0),
        )


def check_lyapunov(case: ValidationCase) -> LyapunovTest:
    """From a disturbance of each equilibrium and, in a contraction, from anywhere in the ball."""
    generator = case.generator(7)
    found = solve(in_double(case.problem), case.z.double(), silent(EXACT))
    rows = found.converged.nonzero().flatten()
    if not len(rows):
        return LyapunovTest(0.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0)
    problem, z = in_double(case.problem).take(rows), found.value[rows]
    starts = [z + case.push * random_directions(z, generator=generator)]
    if case.contractive:
        starts.append(points_in_ball(problem, generator=generator))
    several = torch.arange(len(z)).repeat(len(starts))
    local = local_lipschitz(problem, z, steps=100, generator=generator)[several]
    problem, rest, z = problem.take(several), z[several], torch.cat(starts)
    lowest = problem.energy(rest)
    steps = []
    for _ in range(STEPS):
        mapped, energy = problem.map_and_energy(z)
        steps.append((energy - lowest, (mapped - z).square().sum(-1), (z - rest).norm(dim=-1)))
        z = mapped
    above, residual, distance = (torch.stack(values) for values in zip(*steps, strict=True))
    return _judge(case, above, residual, distance, DIGITS * (1 + lowest.abs()), local)


def _judge(
    case: ValidationCase,
    above: Float[Tensor, "k M"],
    residual: Float[Tensor, "k M"],
    distance: Float[Tensor, "k M"],
    digits: Float[Tensor, "M"],
    local: Float[Tensor, "M"],
) -> LyapunovTest:
    """Of ``M`` starts, ``E(z_k) - E(z*)``, squared residuals and distances from ``z*``; ``digits`` is what rounding
    makes of a difference of energies."""
    falls = (above[1:] < above[:-1]) | (residual[:-1] <= digits)
    # a start that leaves for another equilibrium is not near this one
    returned = distance[-1] <= FAR * case.radius
    off = distance > 1e-3 * case.radius
    positive = torch.where(off, above > 0, above >= -digits) | ~(returned | case.contractive)
    near = (distance[:-1] <= ASYMPTOTIC * case.radius) & (above[:-1] > 100 * digits)
    excess = torch.where(near, above[1:] / above[:-1] - local, -1.0)
    bounded = torch.ones_like(falls)
    if case.contractive:
        room = 2 * max(1 - case.certificate, 0.0)
        bounded = room * above <= residual + room * digits
    held = [x.all(0) for x in (positive, falls, excess <= SLACK, bounded)]
    every, positively, down, fast, below = (
        x.double().mean().item() for x in (torch.stack(held).all(0), *held)
    )
    return LyapunovTest(every, positively, down, fast, below, excess.max().item(), above.shape[1])
