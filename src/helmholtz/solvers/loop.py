"""The iteration over rows: each is stopped on its own, and what is left goes on."""

import abc
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from helmholtz._values import has_values, waits_for_device, worth_reading
from helmholtz.solvers.base import AbstractProblem, SolverConfig, Status

TINY = 1e-9
"""Added to ``|f|`` in a relative residual."""
LOOK_EVERY = 4
"""Steps on a GPU between two looks at which rows go on: a step for rows that are done costs it less than a wait."""


class Counts(NamedTuple):
    """What was computed for each row."""

    evaluations: Int[Tensor, "N"]
    products: Int[Tensor, "N"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a problem; counts what is computed for those of them that still go on."""

    problem: AbstractProblem
    """Of all rows."""
    counts: Counts
    """Of all rows."""
    index: Int[Tensor, "n"]
    """Places of these among all."""
    going: Bool[Tensor, "n"]
    """Those that are not done. The others are taken along where no values are (``those_left``)."""
    own: AbstractProblem
    """Of these rows."""

    @classmethod
    def of(cls, problem: AbstractProblem, like: Float[Tensor, "N D"]) -> "Rows":
        """All rows, nothing counted."""
        index = torch.arange(like.shape[0], device=like.device)
        none = like.new_zeros(
            like.shape[0], dtype=torch.long
        )  # made of `like`: under vmap it can be written to
        return cls(
            problem, Counts(none, none.clone()), index, torch.ones_like(none, dtype=torch.bool), problem
        )

    def take(self, rows: Int[Tensor, "m"]) -> "Rows":
        """Some of these rows, counted together with them."""
        index = self.index[rows]
        return Rows(self.problem, self.counts, index, self.going[rows], self.problem.take(index))

    def only(self, going: Bool[Tensor, "n"]) -> "Rows":
        """The same rows, of which only these go on."""
        return Rows(self.problem, self.counts, self.index, self.going & going, self.own)

    def map(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        self.counts.evaluations[self.index] += self.going
        return self.own.map(z)

    def map_and_energy(self, z: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        self.counts.evaluations[self.index] += self.going
        return self.own.map_and_energy(z)

    def jvp(self, z: Float[Tensor, "n D"], v: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        self.counts.products[self.index] += self.going
        return self.own.jvp(z, v)


def those_left(going: Bool[Tensor, "n"], step: int = LOOK_EVERY) -> Int[Tensor, "m"] | None:
    """Places of the rows that go on; None if all do, and where no values are: there every row is taken along to the
    last step, and nothing is written any more for those that are done. On a GPU, which would have to be waited for,
    that is so between two of every ``LOOK_EVERY`` steps."""
    if not has_values(going) or (waits_for_device(going) and (step == 0 or step % LOOK_EVERY)):
        return None
    if bool(going.all()):
        return None
    return going.nonzero().squeeze(1)


def choose(
    these: Bool[Tensor, "n"], x: Shaped[Tensor, "n *rest"], y: Shaped[Tensor, "n *rest"]
) -> Shaped[Tensor, "n *rest"]:
    """These rows of ``x``, the others of ``y``."""
    return torch.where(these.view(-1, *(1,) * (x.ndim - 1)), x, y)


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

    def put(self, rows: Int[Tensor, "m"], values: "Point", these: Bool[Tensor, "m"]) -> None:
        """Overwrite ``these`` of the ``rows``."""
        for mine, theirs in zip(self, values, strict=True):
            mine[rows] = choose(these, theirs, mine[rows])

    def finite(self) -> Bool[Tensor, "n"]:
        return self.residual.isfinite() & ~self.energy.isnan()


def evaluate(rows: Rows, z: Float[Tensor, "n D"], before: Point | None, *, energies: bool = True) -> Point:
    """Map, and energy if wanted, at ``z``; ``before`` is the iterate to which the energy is compared."""
    f, energy = rows.map_and_energy(z) if energies else (rows.map(z), z.new_full((z.shape[0],), torch.inf))
    residual = relative_residual(z, f)
    change = energy - before.energy if before is not None else energy.new_full((z.shape[0],), torch.inf)
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
        new = _replaced(rows, point, new, refused)
        rule.restart(refused)
    return new


def _replaced(rows: Rows, old: Point, new: Point, refused: Bool[Tensor, "n"]) -> Point:
    """``new``, and one step of the map from ``old`` where it is refused."""
    index = those_left(refused)
    if index is None:
        plain = evaluate(rows.only(refused), old.f, old)
        return Point(*(choose(refused, *both) for both in zip(plain, new, strict=True)))
    if len(index):
        old = old.take(index)
        new.put(index, evaluate(rows.take(index), old.f, old), refused[index])
    return new


class Trace:
    """What all rows did, step by step. Empty where no values are."""

    def __init__(self, *, record: bool) -> None:
        self.record = record
        self._now: tuple[Tensor, ...] | None = None
        self.energy_history: list[float] = []
        self.residual_history: list[float] = []
        self.iterates: list[Tensor] | None = [] if record else None
        self.energies: list[Tensor] | None = [] if record else None

    def begin(self, start: Point) -> None:
        """All rows before a step."""
        self._now = tuple(x.clone() for x in self._kept(start)) if worth_reading(start.z) else None

    def _kept(self, point: Point) -> tuple[Tensor, ...]:
        return (point.residual, point.energy, point.z)[: 3 if self.record else 2]

    def move(self, rows: Int[Tensor, "n"], point: Point, these: Bool[Tensor, "n"], *, energies: bool) -> None:
        """``these`` of the ``rows`` made a step."""
        if self._now is not None:
            for mine, theirs in zip(self._now, self._kept(point), strict=True):
                mine[rows] = choose(these, theirs, mine[rows])
            self.add(energies=energies)

    def add(self, *, energies: bool) -> None:
        """Remember where all rows are."""
        if self._now is None:
            return
        residual, energy, *z = self._now
        self.residual_history.append(residual.mean().item())
        if energies:
            self.energy_history.append(energy.mean().item())
        if self.iterates is not None and self.energies is not None:
            self.iterates.append(z[0].clone())
            self.energies.append(energy.clone())


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
        limit: steps of each row at most; none is above ``config.max_steps``.
        energies: if false, no energy is evaluated (unless recorded) and the residual alone decides on convergence.
    """
    answer, point, recorded = start.clone(), start, energies or trace.record
    num_steps = torch.zeros_like(limit)
    status = torch.where(start.finite(), int(Status.MAX_STEPS), int(Status.NONFINITE))
    rows = rows.only(start.finite() & (limit > 0))
    trace.begin(start)
    for step in range(config.max_steps):
        left = those_left(rows.going, step)
        if left is not None:
            if not len(left):
                break
            rule.take(left)
            rows, point = rows.take(left), point.take(left)
        point = advance(rows, rule, point, step, energies=recorded)
        index, going, finite = rows.index, rows.going, point.finite()
        converged = finite & (point.residual <= config.rtol)
        if energies:
            converged &= point.change <= config.energy_rtol * (1 + point.energy.abs())
        num_steps[index] += going
        ended = torch.where(converged, int(Status.CONVERGED), int(Status.MAX_STEPS))
        ended = ended.masked_fill(~finite, int(Status.NONFINITE))
        status[index] = torch.where(going, ended, status[index])
        better = converged | (finite & (point.residual < answer.residual[index]))
        answer.put(index, point, going & better)
        trace.move(index, point, going & finite, energies=recorded)
        rows = rows.only(finite & ~converged & (num_steps[index] < limit[index]))
    return Outcome(answer, status, num_steps)
