"""Gradients through an equilibrium."""

import abc
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from helmholtz._checks import check_choice, check_integer, check_positive
from helmholtz._once import DifferentiableOnce
from helmholtz._values import has_values, worth_reading
from helmholtz.solvers.base import (
    ON_NONCONVERGENCE,
    AbstractProblem,
    BackwardInfo,
    OnNonconvergence,
    Solution,
    warn_or_raise,
)
from helmholtz.solvers.loop import Rows
from helmholtz.solvers.newton_cg import LinearSolution, conjugate_gradients


class AbstractAdjoint(abc.ABC):
    """How the value of a solution is differentiated. Subclasses are final, frozen dataclasses."""

    @abc.abstractmethod
    def attach(self, problem: AbstractProblem, solution: Solution) -> Float[Tensor, "N D"]:
        """The solution's value, differentiable in whatever ``problem`` was built from; the same problem that was
        solved."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Implicit(AbstractAdjoint):
    r"""The gradient of the equilibrium itself (implicit function theorem; Bai, Kolter & Koltun 2019).

    With the incoming gradient ``v``, :math:`(I - J(z^*))\, g = v` is solved by conjugate gradients, row by row, and
    ``g`` goes backward through one evaluation of the map at :math:`z^*`. The Jacobian is symmetric, and below 1 at a
    minimum. ``solution.backward`` then holds steps and residuals.

    Nothing of the iterations is kept: memory is that of one evaluation. The value is the solver's, bit for bit. The
    start gets no gradient, as the equilibrium does not move with it. In a compiled graph every system takes
    ``max_steps`` products, and whether it was solved is not looked at.

    Raises: in the backward pass, ConvergenceError if the system of a row is not solved (unless
        ``on_nonconvergence`` says otherwise: the best ``g`` found is used, ``v`` where curvature is negative), and
        RuntimeError for a second derivative, which there is none of.
    """

    rtol: float = 1e-6
    """Residual of the linear system, relative to ``v``: the scale of the loss does not matter."""
    max_steps: int = 50
    """Products with the Jacobian per row at most."""
    on_nonconvergence: OnNonconvergence = "raise"
    """What happens if the system of a row is not solved."""

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        check_integer("max_steps", self.max_steps)
        check_choice("on_nonconvergence", self.on_nonconvergence, ON_NONCONVERGENCE)

    def attach(self, problem: AbstractProblem, solution: Solution) -> Float[Tensor, "N D"]:
        z = solution.value
        if not torch.is_grad_enabled():
            return z
        with torch.autocast(z.device.type, enabled=False):
            mapped = problem.map(z)
        return _Implicit.call(mapped, z, problem, solution, self)


class _Implicit(DifferentiableOnce):
    why = (
        "an implicit gradient has no second derivative. Use the Unrolled adjoint, or differentiate the energy at the "
        "detached equilibrium"
    )

    @staticmethod
    def forward(
        ctx: Any, mapped: Tensor, z: Tensor, problem: AbstractProblem, solution: Solution, adjoint: Implicit
    ) -> Tensor:
        ctx.problem, ctx.solution, ctx.adjoint = problem, solution, adjoint
        ctx.save_for_backward(z, mapped)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (z, _), adjoint = ctx.saved_tensors, ctx.adjoint
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            rows, wide = Rows.of(ctx.problem, z), v.to(z.dtype)
            solved = conjugate_gradients(rows, z, wide, rtol=adjoint.rtol, max_steps=adjoint.max_steps)
            if worth_reading(z) or (has_values(z) and adjoint.on_nonconvergence == "raise"):
                ctx.solution.backward = BackwardInfo(solved.num_steps, solved.residual)
                _report(solved, adjoint)
            hopeless = solved.indefinite & (solved.num_steps == 1)
            g = torch.where(hopeless.unsqueeze(1), wide, solved.value)
        return g, None, None, None, None


def _report(solved: LinearSolution, adjoint: Implicit) -> None:
    failed = ~(solved.residual <= adjoint.rtol)
    if not failed.any() or adjoint.on_nonconvergence == "ignore":
        return
    saddles = int(solved.indefinite.sum())
    why = f", {saddles} of them at a saddle, where there is no gradient" if saddles else ""
    message = (
        f"the linear system of the implicit gradient was not solved for {int(failed.sum())} of {len(failed)} rows"
        f"{why}: worst relative residual {solved.residual[failed].max().item():.3g}, wanted {adjoint.rtol:g} within "
        f"{adjoint.max_steps} steps. Raise the adjoint's max_steps or rtol, or set its on_nonconvergence"
    )
    warn_or_raise(message, adjoint.on_nonconvergence, stacklevel=3)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom(AbstractAdjoint):
    """The gradient of ``n_steps`` plain steps from the equilibrium (Geng et al. 2021): as if earlier ones did not
    depend on the parameters, nor the equilibrium on the start. Its error shrinks with the contraction rate to the
    power of ``n_steps``. The value is the solver's, bit for bit; memory is that of ``n_steps`` evaluations."""

    n_steps: int

    def __post_init__(self) -> None:
        check_integer("n_steps", self.n_steps)

    def attach(self, problem: AbstractProblem, solution: Solution) -> Float[Tensor, "N D"]:
        if not torch.is_grad_enabled():
            return solution.value
        _refuse_nested_transforms()
        z = _plain_steps(problem, solution.value, self.n_steps)
        return _differentiable_once(solution.value + (z - z.detach()))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Unrolled(AbstractAdjoint):
    """``n_steps`` plain steps from the start, differentiated as they are, by the start as well: for tests and small
    problems. The value is where these steps end, not the solver's; memory is that of all of them."""

    n_steps: int | None = None
    """None: as many as the solver took, row by row."""

    def __post_init__(self) -> None:
        if self.n_steps is not None:
            check_integer("n_steps", self.n_steps)

    def attach(self, problem: AbstractProblem, solution: Solution) -> Float[Tensor, "N D"]:
        _refuse_nested_transforms()
        if self.n_steps is not None:
            return _plain_steps(problem, solution.start, self.n_steps)
        z, num_steps = solution.start, solution.num_steps
        taken = int(num_steps.max()) if num_steps.numel() else 0  # torch 2.9 has no tolist in torch.func.grad
        for step in range(taken):
            z = torch.where((num_steps > step).unsqueeze(1), _plain_steps(problem, z, 1), z)
        return z


def _differentiable_once(z: Tensor) -> Tensor:
    """``z``, of which a second derivative raises: it would take the equilibrium for a constant."""
    why = (
        "a phantom gradient is differentiable once: its derivative would leave out how the equilibrium moves"
    )
    transformed = (
        torch._C._are_functorch_transforms_active()
    )  # whose own backward pass always keeps its graph
    if torch.compiler.is_compiling() or transformed or not z.requires_grad:
        return z

    def refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            raise RuntimeError(why)

    z.register_hook(refuse)
    return z


def _refuse_nested_transforms() -> None:
    """A solver's iterations are cut off from one transform of ``torch.func`` by detaching, not from one around it."""
    if not torch._C._are_functorch_transforms_active():
        return
    levels = torch._C._functorch.get_interpreter_stack() or []
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    if sum(level.key() in kinds for level in levels) > 1:
        raise RuntimeError(
            "the gradient of an equilibrium is differentiable once under transforms of torch.func: for a second "
            "derivative take torch.autograd.grad(..., create_graph=True)"
        )


def _plain_steps(problem: AbstractProblem, z: Float[Tensor, "N D"], n_steps: int) -> Float[Tensor, "N D"]:
    with torch.autocast(z.device.type, enabled=False):
        for _ in range(n_steps):
            z = problem.map(z)
    return z
