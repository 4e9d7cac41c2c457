"""What every test of the validator starts from, and the form of what it finds."""

import abc
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.evals.equilibria import pattern_norm, read
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, require_equilibrium
from helmholtz.ops.token_energy import contraction_certificate
from helmholtz.solvers import AbstractAdjoint, SolverConfig, solve
from helmholtz.solvers.base import Mode

Comparison = Literal["<", "<=", ">", ">="]
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SOLVER_MODES: tuple[Mode, ...] = ("alternating", "simultaneous", "cascade")
TIGHT_RTOL = 1e-5
"""Relative residual to which a test solves: float32 reaches it, and a wrong answer cannot hide behind 1e-3."""

FAR, NEAR = 0.1, 0.05
"""Disturbances in norms of the patterns, of a contraction and of a model that may have several equilibria."""


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One number against its limit; NaN is on no side of any limit."""

    what: str
    measured: float
    comparison: Comparison
    limit: float

    @property
    def passed(self) -> bool:
        return bool(COMPARE[self.comparison](self.measured, self.limit))


@dataclass(frozen=True, slots=True)
class AbstractTest(abc.ABC):
    """What one test of the validator measured. A subclass's properties are its verdicts, by the original's names."""

    @abc.abstractmethod
    def checks(self) -> tuple[Check, ...]:
        """The numbers that decide, with their limits."""

    def notes(self) -> dict[str, float]:
        """Numbers that are told and decide nothing."""
        return {}

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks())

    def to_dict(self) -> dict[str, Any]:
        """Plain values: all fields, the verdicts, ``passed`` and the checks."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks()]
        words = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        verdicts = {name: getattr(self, name) for name in words}
        return asdict(self) | verdicts | {"passed": self.passed, "checks": checks}


@final
@dataclass(frozen=True, slots=True)
class ValidationCase:
    """A model, a text, and the energies that the model makes of its tokens; a row per token."""

    model: Decoder
    tokens: Int[Tensor, "B T"]
    problem: TokenProblem
    """In the dtype in which the model solves it."""
    start: Float[Tensor, "N D"]
    z: Float[Tensor, "N D"]
    """Equilibria, solved for to ``TIGHT_RTOL`` from where the model's solver stopped."""
    found: Bool[Tensor, "N"]
    """Whether the model's own solver converged."""
    contractive: bool
    """The regime that the model's config promises."""
    certificate: float
    """A bound of the Lipschitz constant of all rows' maps."""
    radius: float
    """Norm of the patterns; 1 without any."""
    seed: int

    @property
    def solver(self) -> SolverConfig:
        """The model's solver, asked for more digits and silent about rows it does not solve."""
        own = self.model.solver
        return replace(
            silent(own),
            rtol=min(own.rtol, TIGHT_RTOL),
            energy_rtol=min(own.energy_rtol, TIGHT_RTOL),
            max_steps=max(own.max_steps, 100),
        )

    @property
    def allowed_distance(self) -> float:
        r""":math:`10\, \mathrm{rtol} / (1 - L)`: how far apart, in norms of ``z``, two answers can be that are one."""
        return 10 * self.solver.rtol / (1 - self.certificate) if self.certificate < 1 else 0.0

    @property
    def push(self) -> float:
        """Size of a disturbance that should be undone."""
        return (FAR if self.contractive else NEAR) * self.radius

    def generator(self, offset: int) -> torch.Generator:
        """Random numbers of one test, which do not depend on which tests ran before."""
        return torch.Generator().manual_seed(1000 * self.seed + offset)


def silent(solver: SolverConfig) -> SolverConfig:
    """The same without a warning or an error: a test counts what did not converge."""
    return replace(solver, on_nonconvergence="ignore")


@contextmanager
def solving_with(
    model: Decoder, solver: SolverConfig, adjoint: AbstractAdjoint | None = None
) -> Iterator[None]:
    """The model with another solver and adjoint, in evaluation mode; afterwards it is as it was."""
    layer = require_equilibrium(model)
    own = layer.solver, layer.adjoint
    layer.solver = solver
    if adjoint is not None:
        layer.adjoint = adjoint
    try:
        with evaluation_mode(model):
            yield
    finally:
        layer.solver, layer.adjoint = own


def validation_case(model: Decoder, tokens: Int[Tensor, "B T"], *, seed: int) -> ValidationCase:
    """Run the model on ``tokens`` as a user would, and solve once more, for more digits."""
    with solving_with(model, silent(model.solver)):
        equilibrium = read(model, tokens).equilibrium
    assert equilibrium is not None
    problem = equilibrium.problem
    case = ValidationCase(
        model=model,
        tokens=tokens,
        problem=problem,
        start=equilibrium.solution.start.detach(),
        z=equilibrium.solution.value,
        found=equilibrium.solution.converged,
        contractive=require_equilibrium(model).config.stability == "contractive",
        certificate=contraction_certificate(problem.field, problem.parameters),
        radius=pattern_norm(problem.parameters),
        seed=seed,
    )
    return replace(case, z=solve(problem, case.z, case.solver).value)


def rounding_limit(x: Tensor) -> float:
    """1e-10 for float64 and 1e-5 for float32: some roundings, and far below any mistake."""
    return 1e-10 if x.dtype == torch.float64 else 1e-5
