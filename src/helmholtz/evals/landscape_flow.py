"""Where solvers go in one token's energy: their paths, the basins of the points they end in, and what those are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.evals.equilibria import jacobian, repeated
from helmholtz.evals.landscape_case import SAME, Plane, TokenCase, main_directions
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.ops.hopfield import hopfield_weights
from helmholtz.solvers import solve
from helmholtz.solvers.base import Mode

MODES: tuple[Mode, ...] = ("alternating", "simultaneous", "cascade", "picard")
"""The three of the model, and plain steps, which are what the certificate speaks of."""
CLOSE: dict[str, Any] = {
    "rtol": 1e-8,
    "energy_rtol": 1e-8,
    "max_steps": 200,
    "damping": 1.0,
    "on_nonconvergence": "ignore",
}
"""How closely paths and basins are followed; the rest is the model's own solver."""


@dataclass(frozen=True, slots=True)
class Path:
    """The iterates of one solver, as it took them."""

    mode: str
    iterates: Float[Tensor, "k D"]
    """The start first."""
    energy: Float[Tensor, "k"]
    """Above the equilibrium's."""
    residual: Float[Tensor, "k"]
    """``|f(z) - z| / |f(z)|``."""
    num_evaluations: int
    """Evaluations of the map or of products with its Jacobian."""
    converged: bool
    ends_at_equilibrium: bool
    """At the model's equilibrium; otherwise at another one."""

    def num_steps(self, rtol: float) -> int | None:
        """Steps until the residual is at most ``rtol`` and stays there; None if it never does."""
        above = (self.residual > rtol).nonzero().flatten()
        first = int(above[-1]) + 1 if len(above) else 0
        return first if first < len(self.residual) else None


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Paths of all modes from one token's start to its equilibrium."""

    case: TokenCase
    paths: tuple[Path, ...]
    certificate: float
    """A bound of the factor by which plain steps shrink the distance to the equilibrium."""
    contraction: float
    """The factor near the equilibrium: the largest eigenvalue of the Jacobian there."""
    axes: Float[Tensor, "2 D"]
    """Main directions of all iterates around the equilibrium."""
    explained: float
    """Part of the iterates' variance around the equilibrium that lies in them."""


@dataclass(frozen=True, slots=True)
class CriticalPoint:
    """What kind of point it is at which the gradient vanishes."""

    z: Float[Tensor, "D"]
    energy: float
    gradient_norm: float
    smallest_curvature: float
    """Smallest eigenvalue of the energy's Hessian ``I - J``, from its whole spectrum."""
    num_descending: int
    """Negative eigenvalues: independent directions in which the energy falls."""
    pattern: int | None
    """The one that it retrieves most; None without patterns."""
    pattern_weight: float
    """Its retrieval weight."""

    @property
    def kind(self) -> Literal["minimum", "saddle"]:
        return "minimum" if self.smallest_curvature > 0 else "saddle"


@dataclass(frozen=True, slots=True)
class Basins:
    """Which start in a plane ends where. Index ``[j, i]`` is at ``(ticks[i], ticks[j])``."""

    case: TokenCase
    plane: Plane
    ticks: Float[Tensor, "n"]
    label: Int[Tensor, "n n"]
    """Index into ``attractors``; -1 where the solver did not converge."""
    num_steps: Int[Tensor, "n n"]
    attractors: tuple[CriticalPoint, ...]
    """The one with the largest basin in the plane first."""
    shares: tuple[float, ...]
    """Part of the starts that each attracts."""

    @property
    def converged(self) -> Bool[Tensor, "n n"]:
        return self.label >= 0

    def end(self, j: int, i: int) -> CriticalPoint:
        """Where the start at ``(ticks[i], ticks[j])`` ends; it has converged."""
        return self.attractors[int(self.label[j, i])]


def trajectories(case: TokenCase) -> Trajectories:
    """Solve one token from its start in every mode, and keep the iterates."""
    paths = tuple(_path(case, mode) for mode in MODES)
    offsets = torch.cat([path.iterates for path in paths]) - case.z
    axes, explained = main_directions(offsets)
    return Trajectories(
        case=case,
        paths=paths,
        certificate=case.certificate,
        contraction=torch.linalg.eigvalsh(jacobian(case.problem, 0, case.z))[-1].item(),
        axes=axes,
        explained=explained,
    )


def _path(case: TokenCase, mode: Mode) -> Path:
    config = replace(case.solver, mode=mode, **CLOSE)
    solution = solve(case.problem, case.start.unsqueeze(0), config, record=True)
    assert solution.iterates is not None
    iterates = torch.cat(solution.iterates)
    step, energy = case.evaluate(iterates)
    away = (solution.value[0] - case.z).norm()
    return Path(
        mode=mode,
        iterates=iterates,
        energy=energy,
        residual=step.norm(dim=-1) / (iterates + step).norm(dim=-1),
        num_evaluations=int(solution.num_evaluations + solution.num_products),
        converged=bool(solution.converged.all()),
        ends_at_equilibrium=bool(away < SAME * case.radius),
    )


def critical_point(case: TokenCase, z: Float[Tensor, "D"]) -> CriticalPoint:
    """What kind of point ``z`` is, if the gradient vanishes there: from all eigenvalues of the Hessian.

    A saddle's falling directions are found however few they are, which Rayleigh quotients of random directions do not.
    """
    step, energy = case.evaluate(z.unsqueeze(0))
    curvature = 1 - torch.linalg.eigvalsh(jacobian(case.problem, 0, z))
    weights = hopfield_weights(z, case.patterns, case.problem.parameters.beta)
    return CriticalPoint(
        z=z,
        energy=energy.item(),
        gradient_norm=step.norm().item(),
        smallest_curvature=curvature.min().item(),
        num_descending=int((curvature < 0).sum()),
        pattern=int(weights.argmax()) if len(weights) else None,
        pattern_weight=weights.max().item() if len(weights) else 0.0,
    )


def basins(case: TokenCase, plane: Plane, ticks: Float[Tensor, "n"], *, mode: Mode = "picard") -> Basins:
    """Solve from every point of a grid, all in one batch, and sort the starts by where they end.

    End points closer than a tenth of the patterns' norm are one attractor.

    Args:
        mode: "picard" follows plain steps, which stay in the basin of the energy they descend; the others are what a
            model does, and may step over a ridge.
    """
    starts = plane.grid(ticks)
    config = replace(case.solver, mode=mode, **CLOSE)
    solution = solve(repeated(case.problem, 0, len(starts)), starts, config)
    label, centers = _clusters(solution.value, solution.converged, SAME * case.radius)
    counts = [int((label == number).sum()) for number in range(len(centers))]
    order = sorted(range(len(centers)), key=lambda number: -counts[number])
    rank = torch.tensor([*(order.index(number) for number in range(len(centers))), -1])
    size = (len(ticks), len(ticks))
    return Basins(
        case=case,
        plane=plane,
        ticks=ticks,
        label=rank[label].view(size),
        num_steps=solution.num_steps.view(size),
        attractors=tuple(critical_point(case, centers[number]) for number in order),
        shares=tuple(counts[number] / len(starts) for number in order),
    )


def _clusters(
    ends: Float[Tensor, "m D"], converged: Bool[Tensor, "m"], distance: float
) -> tuple[Int[Tensor, "m"], list[Tensor]]:
    """Each end's cluster (-1: not converged) and a member of each; a cluster is what is close to its first member."""
    label = torch.full((len(ends),), -1)
    open_ = converged.clone()
    centers: list[Tensor] = []
    while open_.any():
        center = ends[int(open_.nonzero()[0])]
        near = open_ & ((ends - center).norm(dim=-1) < distance)
        label[near] = len(centers)
        centers.append(center)
        open_ &= ~near
    return label, centers


def saddles_between(case: TokenCase, minima: Sequence[CriticalPoint]) -> list[CriticalPoint]:
    """The saddles over which one leaves the first of ``minima`` for each other one in a straight line, each once.

    What separates two basins is a saddle's ridge; the saddle's energy is the height of the barrier.
    """
    found: list[CriticalPoint] = []
    for other in minima[1:]:
        near = _along_the_ridge(case, minima[0].z, other.z)
        if near is None:
            continue
        point = critical_point(case, _newton(case.problem, near))
        new = all((point.z - known.z).norm() > SAME * case.radius for known in found)
        if point.kind == "saddle" and point.gradient_norm < 1e-8 * case.radius and new:
            found.append(point)
    return found


def _along_the_ridge(
    case: TokenCase, one: Float[Tensor, "D"], other: Float[Tensor, "D"]
) -> Float[Tensor, "D"] | None:
    """Plain steps from the last point of the line that ends in ``one``: where they nearly rest before they do.

    On the ridge they would end in the saddle, from next to it they pass by.
    """
    config = replace(case.solver, **{**CLOSE, "mode": "picard", "max_steps": 1000})
    low, high = 0.0, 1.0
    for _ in range(10):  # of 5 bits each
        places = torch.linspace(low, high, 33, dtype=one.dtype)
        starts = one + places.unsqueeze(1) * (other - one)
        ends = solve(repeated(case.problem, 0, len(starts)), starts, config).value
        away = (ends - one).norm(dim=-1) > SAME * case.radius
        if away[0] or not away.any():
            return None
        first = int(away.nonzero()[0])
        low, high = places[first - 1].item(), places[first].item()
    start = (one + low * (other - one)).unsqueeze(0)
    iterates = solve(case.problem, start, config, record=True).iterates
    assert iterates is not None
    path = torch.cat(iterates)
    path = path[(path - one).norm(dim=-1) > SAME * case.radius]
    return path[int(case.evaluate(path)[0].norm(dim=-1).argmin())] if len(path) else None


def _newton(problem: TokenProblem, z: Float[Tensor, "D"], *, steps: int = 50) -> Float[Tensor, "D"]:
    """Solve ``f(z) = z`` by Newton's method with the dense Jacobian; a saddle attracts it as a minimum does."""
    identity = torch.eye(len(z), dtype=z.dtype)
    for _ in range(steps):
        step = (problem.map(z.unsqueeze(0)) - z)[0]
        z = z + torch.linalg.lstsq(identity - jacobian(problem, 0, z), step.unsqueeze(1)).solution.squeeze(1)
        if step.norm() < 1e-13 * z.norm():
            break
    return z
