"""Tests of the equilibria: do disturbed tokens return, do all starts and modes of the solver agree, and is the energy
above the equilibrium a Lyapunov function of plain steps."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.convergence_case import (
    FAR,
    SOLVER_MODES,
    AbstractTest,
    Check,
    ValidationCase,
    silent,
    solving_with,
)
from helmholtz.evals.equilibria import in_double, points_in_ball, random_directions, read
from helmholtz.evals.landscape_case import EXACT
from helmholtz.solvers import Solution, solve
from helmholtz.solvers.spectrum import local_lipschitz, top_eigenvector

EIGENVECTOR_STEPS = 100
RANDOM_STARTS = 8
"""Per token."""
RETURNED = 0.02
"""Distance, in norms of the patterns, within which a disturbed token of the second kind counts as returned."""

PLAIN_STEPS = 60
DIGITS = 1e-11
"""Differences of energies, relative to ``1 + |E|``, below which float64 shows rounding and no more."""
ASYMPTOTIC = 0.02
"""Distance, in norms of the patterns, within which the Jacobian is that of the equilibrium."""
SLACK = 0.05
"""What it may differ by there."""


@final
@dataclass(frozen=True, slots=True)
class StabilityTest(AbstractTest):
    """Whether a token that is pushed away from its equilibrium comes back, also along the weakest direction."""

    contractive: bool
    tested_equilibria: int
    """Tokens for which the model's own solver found an equilibrium; each is pushed three times."""
    stability_rate: float
    """Part of the pushes that are undone."""
    worst_return: float
    """Largest distance from the equilibrium after a push, in its norm."""

    @property
    def is_stable(self) -> bool:
        return self.passed

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("equilibria tested", self.tested_equilibria, ">", 0),
            Check("pushes that are undone", self.stability_rate, ">=", 0.99 if self.contractive else 0.95),
        )


@final
@dataclass(frozen=True, slots=True)
class UniquenessTest(AbstractTest):
    """Whether random starts, starts given to the model and all modes of the solver lead to one equilibrium."""

    contractive: bool
    start_distance: float
    """Largest distance between ends of random starts and the equilibrium, in its norm."""
    z_init_distance: float
    """The same for starts that are handed to the model as ``z_init``."""
    mode_distance: float
    """The same for the modes of the solver."""
    allowed: float
    """``10 rtol / (1 - L)``."""
    unsolved: int
    """Starts from which the solver did not converge."""
    mean_attractors: float
    """Different ends per token, of the equilibrium and random starts."""
    max_attractors: int
    tested_starts: int

    @property
    def is_unique(self) -> bool:
        return self.max_attractors == 1

    def checks(self) -> tuple[Check, ...]:
        tested = Check("starts tested", self.tested_starts, ">", 0)
        if not self.contractive:
            return (tested,)
        return (
            Check("distance, random starts", self.start_distance, "<=", self.allowed),
            Check("distance, z_init", self.z_init_distance, "<=", self.allowed),
            Check("distance, modes", self.mode_distance, "<=", self.allowed),
            Check("starts without a solution", self.unsolved, "<=", 0),
            tested,
        )

    def notes(self) -> dict[str, float]:
        return {"attractors per token": self.mean_attractors, "at most": self.max_attractors}


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


def check_stability(case: ValidationCase) -> StabilityTest:
    rows = case.found.nonzero().flatten()
    if not len(rows):
        return StabilityTest(case.contractive, 0, 0.0, math.nan)
    problem, z, generator = case.problem.take(rows), case.z[rows], case.generator(5)
    weakest = top_eigenvector(problem, z, steps=EIGENVECTOR_STEPS, generator=generator)
    returned, distances = [], []
    for direction in (random_directions(z, generator=generator), weakest, -weakest):
        end = solve(problem, z + case.push * direction, case.solver)
        distance, norm = (end.value - z).norm(dim=-1), z.norm(dim=-1)
        near = case.allowed_distance * norm if case.contractive else norm.new_tensor(RETURNED * case.radius)
        returned.append(end.converged & (distance <= near))
        distances.append(distance / norm)
    return StabilityTest(
        contractive=case.contractive,
        tested_equilibria=len(rows),
        stability_rate=torch.stack(returned).double().mean().item(),
        worst_return=torch.stack(distances).max().item(),
    )


def check_uniqueness(case: ValidationCase) -> UniquenessTest:
    problem, z, generator = case.problem, case.z, case.generator(6)
    starts = [points_in_ball(problem, generator=generator) for _ in range(RANDOM_STARTS)]
    found = solve(problem.take(torch.arange(len(z)).repeat(RANDOM_STARTS)), torch.cat(starts), case.solver)
    ends = found.value.view(RANDOM_STARTS, *z.shape)
    modes = [solve(problem, case.start, replace(case.solver, mode=mode)) for mode in SOLVER_MODES]
    attractors = torch.tensor([_num_places(row, 0.1 * case.radius) for row in torch.stack([z, *ends], dim=1)])
    given = _from_z_init(case, starts[0])
    return UniquenessTest(
        contractive=case.contractive,
        start_distance=_relative(ends, z),
        z_init_distance=_relative(given.value, z),
        mode_distance=_relative(torch.stack([solution.value for solution in modes]), z),
        allowed=case.allowed_distance,
        unsolved=sum(int((~solution.converged).sum()) for solution in (found, given, *modes)),
        mean_attractors=attractors.double().mean().item(),
        max_attractors=int(attractors.max()),
        tested_starts=found.value.shape[0],
    )


def _relative(ends: Float[Tensor, "*m N D"], z: Float[Tensor, "N D"]) -> float:
    return ((ends - z).norm(dim=-1) / z.norm(dim=-1)).max().item()


def _num_places(points: Float[Tensor, "m D"], distance: float) -> int:
    """How many of the points are farther than ``distance`` from all that were counted before."""
    counted: list[Tensor] = []
    for point in points:
        if all((point - other).norm() >= distance for other in counted):
            counted.append(point)
    return len(counted)


def _from_z_init(case: ValidationCase, start: Float[Tensor, "N D"]) -> Solution:
    """Solve through the model's forward pass, which a user gives a start."""
    with solving_with(case.model, case.solver):
        z_init = start.view(*case.tokens.shape, -1)
        found = read(case.model, case.tokens, z_init=z_init).equilibrium
    assert found is not None
    return found.solution


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
    for _ in range(PLAIN_STEPS):
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
