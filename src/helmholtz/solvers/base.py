"""What a solver is given, how it is set up and what it gives back."""

import abc
import warnings
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer, check_positive

Mode = Literal["alternating", "simultaneous", "cascade", "picard", "anderson"]
OnNonconvergence = Literal["warn", "raise", "ignore"]

MODES: tuple[Mode, ...] = get_args(Mode)
ON_NONCONVERGENCE: tuple[OnNonconvergence, ...] = get_args(OnNonconvergence)

Problem = TypeVar("Problem", bound="AbstractProblem")


class ConvergenceWarning(UserWarning):
    """A result is less exact than was asked for."""


class ConvergenceError(RuntimeError):
    """A result would be less exact than was asked for."""


def warn_or_raise(message: str, on_nonconvergence: OnNonconvergence, *, stacklevel: int) -> None:
    """A ConvergenceError for "raise", otherwise a ConvergenceWarning."""
    if on_nonconvergence == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel)


class NonFiniteInputError(ValueError):
    """An equilibrium was asked for from a start that is NaN or infinite."""


@runtime_checkable
class Jacobian(Protocol):
    """The Jacobian of a map at one point per row, for several products."""

    def product(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """With a vector per row."""

    def take(self, rows: Int[Tensor, "n"]) -> "Jacobian":
        """Those of ``rows``."""


class AbstractProblem(abc.ABC):
    r"""Independent problems :math:`z = f(z)` with :math:`f(z) = z - \nabla E(z)`, one per row.

    Implementations guarantee that row ``i`` of every result depends on row ``i`` of the arguments and on what belongs
    to row ``i`` alone, and that :math:`\tfrac12 |z|^2 - E(z)` is convex: then :math:`E(f(z)) \le E(z) - \tfrac12
    |f(z) - z|^2` and the Jacobian of ``f`` is symmetric and positive semi-definite.
    """

    @abc.abstractmethod
    def map(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """``f(z)``, differentiable in whatever the problem was built from."""

    @abc.abstractmethod
    def map_and_energy(self, z: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
        """``map(z)`` and ``E(z)``."""

    @abc.abstractmethod
    def jvp(self, z: Float[Tensor, "N D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The Jacobian of ``map`` at ``z`` times ``v``; symmetric, so also the transposed product."""

    def jacobian(self, z: Float[Tensor, "N D"]) -> Jacobian:
        """For several products at one ``z``: what they have in common can be computed once."""
        return _AnyJacobian(self, z)

    @abc.abstractmethod
    def take(self: Problem, rows: Int[Tensor, "n"]) -> Problem:
        """The problems ``rows``, which may repeat."""


@dataclass(frozen=True, slots=True)
class _AnyJacobian:
    """Computed anew for every product."""

    problem: AbstractProblem
    z: Float[Tensor, "N D"]

    def product(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.problem.jvp(self.z, v)

    def take(self, rows: Int[Tensor, "n"]) -> "_AnyJacobian":
        return _AnyJacobian(self.problem.take(rows), self.z[rows])


class Status(IntEnum):
    """How the iteration of a row ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverConfig:
    """How equilibria are found. A row has converged if residual and energy both say so."""

    mode: Mode = "alternating"
    """"alternating" mixes (Anderson) and descends in turn; "simultaneous" takes Newton steps, which lower energy and
    residual at once; "cascade" mixes without looking at energies, then descends; "picard" and "anderson" iterate the
    map as it is, without a guard."""
    max_steps: int = 30
    """Largest number of solver steps per token."""
    rtol: float = 1e-3
    """Residual |f(z) - z| at convergence, relative to |f(z)|."""
    energy_rtol: float = 1e-3
    """Change of the energy by the last step at convergence, relative to 1 + |E|."""
    anderson_window: int = 5
    """Number of iterates that Anderson acceleration mixes."""
    damping: float = 1.0
    """Length of the descent step in residuals, in (0, 2); at 1 it is the fixed-point step."""
    newton_cg_steps: int = 3
    """Products with the Jacobian in a Newton step at most."""
    on_nonconvergence: OnNonconvergence = "warn"
    """What happens if a row does not converge."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_integer("max_steps", self.max_steps)
        check_positive("rtol", self.rtol)
        check_positive("energy_rtol", self.energy_rtol)
        check_integer("anderson_window", self.anderson_window)
        check(0 < self.damping < 2, "damping", self.damping, "between 0 and 2, both excluded")
        check_integer("newton_cg_steps", self.newton_cg_steps)
        check_choice("on_nonconvergence", self.on_nonconvergence, ON_NONCONVERGENCE)


@dataclass(slots=True)
class BackwardInfo:
    """How the linear system of the last backward pass was solved."""

    num_steps: Int[Tensor, "N"]
    """Products with the Jacobian; 0 where the incoming gradient was 0."""
    residual: Float[Tensor, "N"]
    """Of the linear system, relative to the incoming gradient."""


@dataclass(slots=True, kw_only=True)
class Solution:
    """Where the rows ended, in at least float32; always finite where the start was. Only ``start`` has a gradient.

    What a row says depends on that row alone, but for rounding. A row that has not converged is given where its
    residual was smallest.
    """

    value: Float[Tensor, "N D"]
    start: Float[Tensor, "N D"]
    """Where they started, as given: an unrolled iteration is differentiated back to it."""
    status: Int[Tensor, "N"]
    """A ``Status`` per row."""
    num_steps: Int[Tensor, "N"]
    num_evaluations: Int[Tensor, "N"]
    """Evaluations of the map, with or without energy."""
    num_products: Int[Tensor, "N"]
    """Products with the Jacobian; each costs about as much as an evaluation, or two."""
    residual: Float[Tensor, "N"]
    """``|f(z) - z| / (|f(z)| + 1e-9)``; infinite where ``f(start)`` was not finite."""
    energy: Float[Tensor, "N"]
    energy_change: Float[Tensor, "N"]
    """``|E_k - E_{k-1}|`` at the value; infinite at the start."""
    unstable: Bool[Tensor, "N"]
    """Converged on a saddle: an eigenvalue of the Jacobian is above 1. Looked for after more than 10 steps."""
    energy_history: list[float]
    """Mean over rows at the start and after each step. Steps that evaluate no energy (the first phase of "cascade",
    unless recorded) have no entry."""
    residual_history: list[float]
    iterates: list[Float[Tensor, "N D"]] | None = None
    """With ``record``: all rows at the start and after each step, stopped rows where they stopped."""
    energies: list[Float[Tensor, "N"]] | None = None
    """With ``record``: the iterates' energies."""
    backward: BackwardInfo | None = None
    """Filled in by the backward pass of an ``Implicit`` adjoint."""

    @property
    def converged(self) -> Bool[Tensor, "N"]:
        return self.status == int(Status.CONVERGED)
