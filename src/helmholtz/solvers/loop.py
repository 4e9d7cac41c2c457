"""The iteration over rows: each is stopped on its own, and what is left goes on."""

import abc
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.solvers.base import AbstractProblem, SolverConfig, Status

TINY = 1e-9
"""Added to ``|f|`` in a relative residual."""


class Counts(NamedTuple):
    """What was computed for each row."""

    evaluations: Int[Tensor, "N"]
    products: Int[Tensor, "N"]


class Rows:
    """Some rows of a problem; counts what is computed for them."""

    def __init__(self, problem: AbstractProblem, index: Int[Tensor, "n"], counts: Counts) -> None:
        self._problem, self._index = problem, index
        self.counts = counts
        """Of all rows of the problem."""
        self._own = problem.take(index)

    @classmethod
    def of(cls, problem: AbstractProblem, like: Float[Tensor, "N D"]) -> "Rows":
        """All rows, nothing counted."""
        index = torch.arange(len(like), device=like.device)
        return cls(problem, index, Counts(torch.zeros_like(index), torch.zeros_like(index)))

    def take(self, rows: Int[Tensor, "m"]) -> "Rows":
        """Some of these rows, counted together with them."""
        return Rows(self._problem, self._index[rows], self.counts)

    def map(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        self.counts.evaluations[self._index] += 1
        return self._own.map(z)

    def map_and_energy(self, z: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        self.counts.evaluations[self._index] += 1
        return self._own.map_and_energy(z)

    def jvp(self, z: Float[Tensor, "n D"], v: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        self.counts.products[self._index] += 1
        return self._own.jvp(z, v)


class Point(NamedTuple):
    """Rows at an iterate, with what was evaluated there."""

    z: Float[Tensor, "n D"]
    f: Float[Tensor, "n D"]
    energy: Float[Tensor, "n"]
    """Infinite where it was not evaluated."""
    change: Float[Tensor, "n"]
    """``|E_k - E_{k-1}|``, infinite where one of them is not known."""
    residual: Float[Tensor, "n"]
    """Relative; infinite where ``f`` is not finite."""

    def take(self, rows: Tensor) -> "Point":
        return Point(*(x[rows] for x in self))

    def clone(self) -> "Point":
        return Point(*(x.clone() for x in self))

    def put(self, rows: Tensor, values: "Point") -> None:
        """Overwrite ``rows``."""
        for mine, theirs in zip(self, values, strict=True):
            mine[rows] = theirs

    def finite(self) -> Bool[Tensor, "n"]:
        return self.residual.isfinite() & ~self.energy.isnan()


def evaluate(rows: Rows, z: Float[Tensor, "n D"], before: Point | None, *, energies: bool = True) -> Point:
    """Map, and energy if wanted, at ``z``; ``before`` is the iterate to which the energy is compared."""
    f, energy = rows.map_and_energy(z) if energies else (rows.map(z), z.new_full((len(z),), torch.inf))
    residual = relative_residual(z, f)
    change = energy - before.energy if before is not None else energy.new_full((len(z),), torch.inf)
    return Point(z, f, energy, change.abs().nan_to_num(nan=torch.inf), residual)


def relative_residual(z: Float[Tensor, "n D"], f: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    """``|f - z| / |f|``; infinite where that is not a number."""
    return (row_norm(f - z) / (row_norm(f) + TINY)).nan_to_num(nan=torch.inf)


def row_norm(x: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    return torch.linalg.vector_norm(x, dim=-1)


def row_dot(x: Float[Tensor, "n D"], y: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    return (x * y).sum(-1)


class AbstractRule(abc.ABC):
    """How to move from one iterate to the next; what it remembers is per row."""

    @abc.abstractmethod
    def propose(self, rows: Rows, point: Point, step: int) -> Float[Tensor, "n D"]:
        """The next iterate of every row after ``step`` steps."""

    @abc.abstractmethod
    def is_guarded(self, step: int) -> bool:
        """Whether this step's proposal has to lower the energy sufficiently, else is replaced by the map's."""

    def restart(self, refused: Bool[Tensor, "n"]) -> None:  # noqa: B027
        """These rows' proposals were replaced."""

    def take(self, rows: Int[Tensor, "m"]) -> None:  # noqa: B027
        """Only these rows go on."""


DECREASE = 1e-4
"""Of ``|grad E| |dz|``: what a guarded step must lower the energy by at least."""

ROUNDINGS = 8
"""Roundings of an energy's summands: smaller differences of two energies say nothing."""


def decreases(old: Point, new: Point) -> Bool[Tensor, "n"]:
    r"""Whether the energy fell by at least ``DECREASE`` :math:`|\nabla E| |\Delta z|`.

    Where the two energies differ by no more than their rounding, by the trapezoidal rule of the gradients instead,
    :math:`E_k - E_{k+1} \approx \tfrac12 (r_k + r_{k+1}) \cdot \Delta z` (in the spirit of Hager & Zhang 2005).
    """
    move, before, after = new.z - old.z, old.f - old.z, new.f - new.z
    wanted = DECREASE * row_norm(before) * row_norm(move)
    drop = old.energy - new.energy
    size = 1 + old.energy.abs() + old.z.square().sum(-1) / 2
    unclear = drop.abs() <= ROUNDINGS * torch.finfo(drop.dtype).eps * size
    return (drop >= wanted) | (unclear & (row_dot(before + after, move) / 2 >= wanted))


def advance(rows: Rows, rule: AbstractRule, point: Point, step: int, *, energies: bool) -> Point:
    """The next iterate of every row, evaluated."""
    new = evaluate(rows, rule.propose(rows, point, step), point, energies=energies)
    if rule.is_guarded(step):
        refused = ~decreases(point, new)
        if refused.any():
            index = refused.nonzero().squeeze(1)
            old = point.take(index)
            new.put(index, evaluate(rows.take(index), old.f, old))
            rule.restart(refused)
    return new


class Trace:
    """What the rows did, step by step."""

    def __init__(self, *, record: bool) -> None:
        self.record = record
        self.energy_history: list[float] = []
        self.residual_history: list[float] = []
        self.iterates: list[Tensor] | None = [] if record else None
        self.energies: list[Tensor] | None = [] if record else None

    def add(self, now: Point, *, energies: bool) -> None:
        """All rows after a step."""
        if not len(now.z):
            return
        self.residual_history.append(now.residual.mean().item())
        if energies:
            self.energy_history.append(now.energy.mean().item())
        if self.iterates is not None and self.energies is not None:
            self.iterates.append(now.z.clone())
            self.energies.append(now.energy.clone())


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where rows ended."""

    point: Point
    status: Int[Tensor, "N"]
    num_steps: Int[Tensor, "N"]


def iterate(
    rows: Rows,
    start: Point,
    rule: AbstractRule,
    config: SolverConfig,
    limit: Int[Tensor, "N"],
    trace: Trace,
    *,
    energies: bool = True,
) -> Outcome:
    """Move every row by ``rule`` until it has converged, is not finite any more or has made ``limit`` steps.

    Args:
        limit: steps of each row at most.
        energies: if false, no energy is evaluated (unless recorded) and the residual alone decides on convergence.
    """
    answer, now = start.clone(), start.clone()
    status = torch.full_like(limit, int(Status.MAX_STEPS))
    status[~start.finite()] = int(Status.NONFINITE)
    num_steps, step = torch.zeros_like(limit), 0
    active = (start.finite() & (limit > 0)).nonzero().squeeze(1)
    rule.take(active)
    rows, point = rows.take(active) if len(active) else rows, start.take(active)
    while len(active):
        point = advance(rows, rule, point, step, energies=energies or trace.record)
        step += 1
        num_steps[active] += 1
        finite = point.finite()
        converged = finite & (point.residual <= config.rtol)
        if energies:
            converged &= point.change <= config.energy_rtol * (1 + point.energy.abs())
        status[active[converged]] = int(Status.CONVERGED)
        status[active[~finite]] = int(Status.NONFINITE)
        better = converged | (finite & (point.residual < answer.residual[active]))
        answer.put(active[better], point.take(better))
        now.put(active[finite], point.take(finite))
        trace.add(now, energies=energies or trace.record)
        going = finite & ~converged & (num_steps[active] < limit[active])
        if not going.all():
            kept = going.nonzero().squeeze(1)
            active, point = active[kept], point.take(kept)
            rule.take(kept)
            rows = rows.take(kept) if len(kept) else rows
    return Outcome(answer, status, num_steps)
