"""Tests of the energy and its map: do they belong together, is the map a contraction, does every step descend."""

import functools
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.convergence_case import (
    SOLVER_MODES,
    AbstractTest,
    Check,
    ValidationCase,
    rounding_limit,
)
from helmholtz.evals.equilibria import active_patterns, in_double, points_in_ball, random_directions
from helmholtz.layers.dynamics import MAX_CONTRACTION
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.solvers import solve
from helmholtz.solvers.base import Mode
from helmholtz.solvers.spectrum import local_lipschitz

POWER_STEPS = 30
EXACT_POWER_STEPS = 100
"""At equilibria, where an underestimate would call a saddle stable."""
RANDOM_POINTS = 4
"""Per token, in the ball that holds all equilibria."""
MIDPOINTS = 64
DESCENT_STEPS = 30


@final
@dataclass(frozen=True, slots=True)
class ContractionTest(AbstractTest):
    """How far the map can spread two states."""

    contractive: bool
    """The regime: whether a contraction is promised."""
    certificate: float
    """Proven bound of the Lipschitz constant, with the exact norm of ``W``."""
    construction: float
    """``kappa |W|^2 + lambda beta R^2``, which the contractive regime keeps below 0.9 for all parameters."""
    max_lipschitz: float
    """Largest local constant: power iteration at starts, equilibria, random points and midpoints of patterns."""
    mean_lipschitz: float
    max_pair_ratio: float
    """Largest ``|f(x) - f(y)| / |x - y|`` of random pairs; far below the Lipschitz constant in many dimensions."""
    stable_fraction: float
    """Tokens at whose equilibrium the largest eigenvalue of the Jacobian is below 1."""
    tested_points: int

    @property
    def is_contractive(self) -> bool:
        return self.certificate < 1 and self.max_lipschitz <= self.certificate + 1e-3

    def checks(self) -> tuple[Check, ...]:
        tested = Check("points tested", self.tested_points, ">", 0)
        if not self.contractive:
            return (Check("tokens at a stable point", self.stable_fraction, ">=", 0.99), tested)
        return (
            Check("certified Lipschitz constant", self.certificate, "<", 1),
            Check("bound by construction", self.construction, "<=", MAX_CONTRACTION + 1e-5),
            Check("largest local constant", self.max_lipschitz, "<=", self.certificate + 1e-3),
            tested,
        )

    def notes(self) -> dict[str, float]:
        told = {
            "certified Lipschitz constant": self.certificate,
            "largest local constant": self.max_lipschitz,
        }
        return ({} if self.contractive else told) | {"largest ratio of random pairs": self.max_pair_ratio}


@final
@dataclass(frozen=True, slots=True)
class DescentTest(AbstractTest):
    """Whether every step lowers the energy by at least half of the squared residual, at every token."""

    violation_rate: float
    """Part of the plain steps that do not."""
    worst_excess: float
    """Largest ``[E(f(z)) - E(z) + |f(z) - z|^2 / 2] / (1 + |E|)``."""
    rounding: float
    """What rounding may add to it."""
    mode_violations: dict[str, int]
    """Steps of each mode that raise the energy; of ``cascade``, those of its descent."""
    tested_steps: int

    @property
    def monotonic_descent(self) -> bool:
        return self.violation_rate == 0 and not any(self.mode_violations.values())

    def checks(self) -> tuple[Check, ...]:
        rising = (Check(f"rising steps, {name}", n, "<=", 0) for name, n in self.mode_violations.items())
        return (
            Check("steps that descend too little", self.violation_rate, "<=", 0),
            *rising,
            Check("steps tested", self.tested_steps, ">", 0),
        )


@final
@dataclass(frozen=True, slots=True)
class ResidualTest(AbstractTest):
    """Whether the residual is the negative gradient of the energy, and the Jacobian product the map's derivative.

    The largest errors over starts, equilibria and random points; in the model's dtype and again in float64.
    """

    gradient_error: float
    """``|grad E + f(z) - z|`` relative to ``|z| + |f(z)|``."""
    jacobian_error: float
    """``|J v - derivative of f along v|`` for unit vectors."""
    asymmetry: float
    """``|u.Jv - v.Ju|`` for unit vectors."""
    limit: float
    gradient_error_double: float
    jacobian_error_double: float
    asymmetry_double: float
    tested_points: int

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("residual against gradient", self.gradient_error, "<=", self.limit),
            Check("the same, float64", self.gradient_error_double, "<=", 1e-10),
            Check("Jacobian product", self.jacobian_error, "<=", self.limit),
            Check("the same, float64", self.jacobian_error_double, "<=", 1e-10),
            Check("its asymmetry", self.asymmetry, "<=", self.limit),
            Check("the same, float64", self.asymmetry_double, "<=", 1e-10),
            Check("points tested", self.tested_points, ">", 0),
        )


def check_contraction(case: ValidationCase) -> ContractionTest:
    generator, problem, n = case.generator(1), case.problem, len(case.z)
    everywhere = [points_in_ball(problem, generator=generator) for _ in range(RANDOM_POINTS)]
    at_rest = local_lipschitz(problem, case.z, steps=EXACT_POWER_STEPS, generator=generator)
    quick = functools.partial(local_lipschitz, steps=POWER_STEPS, generator=generator)
    anywhere = [quick(problem, points) for points in (case.start, *everywhere)]
    middle = _midpoints(active_patterns(problem.parameters), generator)
    local = torch.cat([at_rest, *anywhere, quick(problem.take(torch.arange(len(middle)) % n), middle)])
    x, y = everywhere[:2]
    ratio = (problem.map(x) - problem.map(y)).norm(dim=-1) / (x - y).norm(dim=-1)
    parameters = problem.parameters
    norm = torch.linalg.matrix_norm(parameters.weight.double(), 2).item()
    memory = parameters.strength.item() * parameters.beta * case.radius**2 * bool(len(middle))
    return ContractionTest(
        contractive=case.contractive,
        certificate=case.certificate,
        construction=parameters.kappa.item() * norm**2 + memory,
        max_lipschitz=local.max().item(),
        mean_lipschitz=local.mean().item(),
        max_pair_ratio=ratio.max().item(),
        stable_fraction=(at_rest < 1).double().mean().item(),
        tested_points=len(local),
    )


def _midpoints(patterns: Float[Tensor, "K D"], generator: torch.Generator) -> Float[Tensor, "n D"]:
    """Between a pattern and the one farthest from it, and between random ones: there the memory is least decided."""
    if len(patterns) < 2:
        return patterns[:0]
    one, other = torch.randint(len(patterns), (2, MIDPOINTS), generator=generator)
    half = MIDPOINTS // 2
    other[:half] = torch.cdist(patterns[one[:half]], patterns).argmax(-1)
    return (patterns[one] + patterns[other]) / 2


def check_descent(case: ValidationCase) -> DescentTest:
    problem, n = case.problem, len(case.z)
    z = torch.cat([case.start, points_in_ball(problem, generator=case.generator(2))])
    rows = problem.take(torch.arange(2 * n) % n)
    excess = []
    mapped, energy = rows.map_and_energy(z)
    for _ in range(DESCENT_STEPS):
        promised = energy - (mapped - z).square().sum(-1) / 2
        z, before = mapped, energy
        mapped, energy = rows.map_and_energy(z)
        excess.append((energy - promised) / (1 + before.abs()))
    worst, limit = torch.stack(excess), rounding_limit(energy)
    return DescentTest(
        violation_rate=(~(worst <= limit)).double().mean().item(),
        worst_excess=worst.max().item(),
        rounding=limit,
        mode_violations={mode: _rising_steps(case, mode, limit) for mode in SOLVER_MODES},
        tested_steps=worst.numel(),
    )


def _rising_steps(case: ValidationCase, mode: Mode, limit: float) -> int:
    """Steps of ``mode`` that raise a row's energy; the first phase of "cascade" may, its second starts no higher."""
    config = replace(case.solver, mode=mode)
    energies = solve(case.problem, case.start, config, record=True).energies
    assert energies is not None
    if mode == "cascade":  # unrecorded, it has energies of the second phase alone
        second = len(solve(case.problem, case.start, config).energy_history) - 1
        energies = energies[:1] + energies[len(energies) - second :]
    before, after = torch.stack(energies[:-1] or energies), torch.stack(energies[1:] or energies)
    return int((~(after - before <= limit * (1 + before.abs()))).sum())


def check_residual(case: ValidationCase) -> ResidualTest:
    n = len(case.z)
    z = torch.cat([case.start, case.z, points_in_ball(case.problem, generator=case.generator(3))])
    problem = case.problem.take(torch.arange(3 * n) % n)
    errors = _derivative_errors(problem, z, case.generator(4))
    double = _derivative_errors(in_double(problem), z.double(), case.generator(4))
    return ResidualTest(*errors, rounding_limit(z), *double, tested_points=len(z))


def _derivative_errors(
    problem: TokenProblem, z: Float[Tensor, "N D"], generator: torch.Generator
) -> tuple[float, float, float]:
    """Of the residual as a gradient, of the Jacobian product, and of its symmetry."""
    u, v = (random_directions(z, generator=generator) for _ in range(2))
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.map_and_energy(leaf)[1].sum(), leaf)
        mapped, derivative = torch.autograd.functional.jvp(problem.map, z.detach(), v)
    mapped, derivative = mapped.detach(), derivative.detach()
    error = (gradient + mapped - z).norm(dim=-1) / (z.norm(dim=-1) + mapped.norm(dim=-1))
    product = problem.jvp(z, v)
    asymmetry = ((u * product).sum(-1) - (v * problem.jvp(z, u)).sum(-1)).abs()
    worst = (error.max(), (product - derivative).norm(dim=-1).max(), asymmetry.max())
    return tuple(x.item() for x in worst)  # type: ignore[return-value]
