"""One token's energy in float64, and planes through its equilibrium.

Lengths are in the units of ``z``; figures divide them by the norm of the patterns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice
from helmholtz.evals.equilibria import (
    active_patterns,
    in_double,
    jacobian,
    pattern_norm,
    random_directions,
    repeated,
)
from helmholtz.layers.equilibrium import Equilibrium, TokenProblem
from helmholtz.layers.hopfield import HopfieldMemory, StoredPatterns
from helmholtz.layers.recall import RECALL
from helmholtz.ops.token_energy import EnergyParameters, TokenField, contraction_certificate
from helmholtz.solvers import SolverConfig, solve

Basis = Literal["memory", "path", "hessian", "random"]
BASES: tuple[Basis, ...] = get_args(Basis)
SAME = 0.1
"""Distance, in norms of the patterns, below which two points count as one place."""
INDEPENDENT = 0.1
"""Sine of the angle from which on two directions span a plane."""
EXACT = SolverConfig(
    mode="alternating", max_steps=200, rtol=1e-11, energy_rtol=1e-11, on_nonconvergence="raise"
)


@dataclass(frozen=True, slots=True)
class TokenCase:
    """One token's energy, where its iteration starts and where it ends."""

    problem: TokenProblem
    """One row, float64."""
    start: Float[Tensor, "D"]
    z: Float[Tensor, "D"]
    """The equilibrium near which the model stopped, to ten digits."""
    energy: float
    """At ``z``."""
    patterns: Float[Tensor, "K D"]
    """The rows of the memory that are not empty."""
    radius: float
    """Their norm; 1 without patterns."""
    solver: SolverConfig
    """How the model solves."""

    @property
    def certificate(self) -> float:
        """A bound of this token's Lipschitz constant; below 1 there is one equilibrium."""
        return contraction_certificate(self.problem.field, self.problem.parameters)

    def evaluate(self, z: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        """``f(z) - z``, the negative gradient of the energy, and ``E(z) - E(z*)``, of all points in one call."""
        mapped, energy = repeated(self.problem, 0, len(z)).map_and_energy(z)
        return mapped - z, energy - self.energy

    def path(self, solver: SolverConfig) -> Float[Tensor, "k D"]:
        """The iterates of a solver from the token's start on, which is the first."""
        solution = solve(self.problem, self.start.unsqueeze(0), solver, record=True)
        assert solution.iterates is not None
        return torch.cat(solution.iterates)

    def ranked_patterns(self) -> Int[Tensor, "K"]:
        """Indices into ``patterns``, the one that the equilibrium retrieves most first."""
        return (self.patterns @ self.z).argsort(descending=True)


@dataclass(frozen=True, slots=True)
class Plane:
    """The points ``origin + x axes[0] + y axes[1]``."""

    basis: str
    origin: Float[Tensor, "D"]
    axes: Float[Tensor, "2 D"]
    """Orthonormal."""
    names: tuple[str, str]
    """What lies along each axis."""
    anchors: tuple[int, ...]
    """Patterns that lie in the plane."""

    def coordinates(self, z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 2"]:
        """Of the nearest points of the plane."""
        return (z - self.origin) @ self.axes.T

    def distance(self, z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
        """From the plane."""
        offset = z - self.origin
        return (offset - (offset @ self.axes.T) @ self.axes).norm(dim=-1)

    def grid(self, ticks: Float[Tensor, "n"]) -> Float[Tensor, "m D"]:
        """All pairs of ticks as points; the second coordinate changes slowest."""
        y, x = torch.meshgrid(ticks, ticks, indexing="ij")
        return self.origin + torch.stack([x.flatten(), y.flatten()], dim=-1) @ self.axes


def token_case(equilibrium: Equilibrium, solver: SolverConfig, *, row: int = 0, token: int = -1) -> TokenCase:
    """The energy of one token of a call.

    Args:
        row: of the batch.
        token: place in the sequence; negative ones count from the end.

    Raises: ValueError for a place that is not in the batch or is a pad; ConvergenceError if it has no equilibrium.
    """
    batch, time = equilibrium.z.shape[:2]
    check(0 <= row < batch, "row", row, f"in [0, {batch}), the batch")
    check(-time <= token < time, "token", token, f"in [{-time}, {time}), the sequence")
    number = row * time + token % time
    if equilibrium.index is not None:
        place = (equilibrium.index == number).nonzero().flatten()
        check(len(place) == 1, "token", token, f"a real token of row {row}, not a pad")
        number = int(place)
    problem = in_double(equilibrium.problem.take(torch.tensor([number])))
    start, near = (
        equilibrium.rows(x)[[number]].detach().double() for x in (equilibrium.z_init, equilibrium.z)
    )
    return exact_case(problem, start, near, solver)


def exact_case(
    problem: TokenProblem, start: Float[Tensor, "1 D"], near: Float[Tensor, "1 D"], solver: SolverConfig
) -> TokenCase:
    """The case of one row in float64, its equilibrium solved for from ``near``. Raises: ConvergenceError."""
    z = solve(problem, near, EXACT).value
    patterns, radius = active_patterns(problem.parameters), pattern_norm(problem.parameters)
    return TokenCase(problem, start[0], z[0], problem.energy(z).item(), patterns, radius, solver)


def memory_case(memory: HopfieldMemory, query: Float[Tensor, "D"]) -> TokenCase:
    r"""The energy of a memory alone, :math:`\tfrac12 |z|^2 - \phi(z)`, from a query: a token's without context.

    Raises: ConvergenceError if the recall does not converge.
    """
    stored: StoredPatterns = memory()
    rows, none = stored.patterns.detach().double(), query.new_zeros(1, 1, dtype=torch.float64)
    field = TokenField(torch.zeros_like(rows[:1]), none, none, none)
    prior = None if stored.log_prior is None else stored.log_prior.double()
    parameters = EnergyParameters(
        torch.zeros_like(rows[:1]), rows, prior, none[0], torch.ones_like(none[0]), stored.beta
    )
    problem, start = TokenProblem(field, parameters), query.detach().double()
    near = solve(problem, start.unsqueeze(0), RECALL).value  # plain steps alone stay in the query's basin
    z = solve(problem, near, EXACT).value
    patterns, radius = active_patterns(parameters), pattern_norm(parameters)
    return TokenCase(problem, start, z[0], problem.energy(z).item(), patterns, radius, RECALL)


def main_directions(offsets: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "k D"], float]:
    """The two along which the offsets are longest, one if there is but one, and the part of their squares in these."""
    sizes, directions = torch.linalg.svd(offsets, full_matrices=False)[1:]
    squares = sizes.square()
    return directions[:2], (squares[:2].sum() / squares.sum()).item() if squares.any() else 1.0


def flat(offsets: Float[Tensor, "*n D"], axes: Float[Tensor, "k D"]) -> Float[Tensor, "*n 2"]:
    """Coordinates along two axes, the second 0 where there is but one."""
    return torch.nn.functional.pad(offsets @ axes.T, (0, 2 - len(axes)))


def choose_plane(case: TokenCase, basis: Basis = "memory", *, seed: int = 0) -> Plane:
    """A plane through the equilibrium.

    Args:
        basis: "memory": towards the two best-matching patterns that are not the equilibrium itself, so that the plane
            holds what competes with it; for want of patterns, towards 0 and the start. "path": the main directions of
            the solver's path. "hessian": the flattest and the steepest direction. "random": two random ones.

    Raises: ValueError for another basis, or if its directions do not span a plane.
    """
    check_choice("basis", basis, BASES)
    if basis == "memory":
        return _memory_plane(case)
    if basis == "path":
        offsets = case.path(replace(case.solver, rtol=1e-8, on_nonconvergence="ignore")) - case.z
        sizes, directions = torch.linalg.svd(offsets, full_matrices=False)[1:]
        check(len(sizes) > 1 and bool(sizes[1] > 1e-9 * sizes[0]), "basis", basis, "of a path that bends")
        named = list(zip(("main direction of the path", "second direction"), directions[:2], strict=True))
    elif basis == "hessian":
        vectors = torch.linalg.eigh(jacobian(case.problem, 0, case.z)).eigenvectors
        named = [("flattest direction", vectors[:, -1]), ("steepest direction", vectors[:, 0])]
    else:
        both = random_directions(case.z.expand(2, -1), generator=torch.Generator().manual_seed(seed))
        named = [("random direction", both[0]), ("another", both[1])]
    return _plane(case, basis, named)


def _memory_plane(case: TokenCase) -> Plane:
    """Candidates in order of preference; the first two that are far from the equilibrium and span a plane."""
    order = case.ranked_patterns().tolist()
    candidates = [(f"pattern {index}", case.patterns[index]) for index in order[:16]]
    candidates += [("0", torch.zeros_like(case.z)), ("start", case.start)]
    offsets = [(f"towards {name}", z - case.z) for name, z in candidates]
    plane = _plane(case, "memory", [(n, x) for n, x in offsets if x.norm() > SAME * case.radius])
    near = plane.distance(case.patterns[order[:16]]) < SAME * case.radius
    anchors = tuple(index for index, close in zip(order, near.tolist(), strict=False) if close)
    return replace(plane, anchors=anchors)


def _plane(case: TokenCase, basis: str, candidates: Sequence[tuple[str, Tensor]]) -> Plane:
    """The plane of the first candidate and the first that is not along it."""
    if candidates:
        name, direction = candidates[0]
        first = direction / direction.norm()
        for other, offset in candidates[1:]:
            across = offset - (offset @ first) * first
            if across.norm() > INDEPENDENT * offset.norm():
                axes = torch.stack([first, across / across.norm()])
                return Plane(basis, case.z, axes, (name, other), ())
    raise ValueError(
        f"basis must be of two directions from the equilibrium, got {basis!r}: they are along one line"
    )
