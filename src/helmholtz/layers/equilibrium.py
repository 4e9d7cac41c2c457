"""The equilibrium of every token: the layer that solves for it, and what it tells about the solution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz._values import worth_reading
from helmholtz.layers.dynamics import Dynamics, TokenDynamics
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.hopfield import HopfieldMemory
from helmholtz.layers.init import init_normal
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.layers.state import KEPT
from helmholtz.ops._compute import full_precision
from helmholtz.ops.hopfield import hopfield_weights
from helmholtz.ops.token_energy import (
    EnergyComponents,
    EnergyParameters,
    TokenField,
    TokenJacobian,
    contraction_certificate,
    energy_components,
    token_energy,
    token_jacobian,
    token_jvp,
    token_map,
    token_map_and_energy,
)
from helmholtz.solvers import (
    AbstractAdjoint,
    AbstractProblem,
    Implicit,
    NonFiniteInputError,
    Phantom,
    Solution,
    SolverConfig,
    Status,
    Unrolled,
    solve,
)
from helmholtz.solvers.loop import choose, relative_residual


@final
@dataclass(frozen=True, slots=True)
class TokenProblem(AbstractProblem):
    """One fixed-point problem per row: ``z = f(z) = z - grad E(z)`` with the row's field and shared parameters."""

    field: TokenField
    parameters: EnergyParameters

    def map(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return token_map(z, self.field, self.parameters)

    def map_and_energy(self, z: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
        return token_map_and_energy(z, self.field, self.parameters)

    def jvp(self, z: Float[Tensor, "N D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return token_jvp(z, v, self.field, self.parameters)

    def jacobian(self, z: Float[Tensor, "N D"]) -> TokenJacobian:
        return token_jacobian(z, self.field, self.parameters)

    def take(self, rows: Int[Tensor, "n"]) -> "TokenProblem":
        return TokenProblem(TokenField(*(x[rows] for x in self.field)), self.parameters)

    def energy(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """The energy whose stationary points the solutions are."""
        return token_energy(z, self.field, self.parameters)


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """The equilibria of a call, differentiable, and how they were found.

    What is per row is of the ``N`` real tokens, in the order of batch and time; ``scatter`` brings it to ``B T``. Where
    no values are, as in a compiled graph, each token has a row, and ``is_real`` tells pads.
    """

    context: Float[Tensor, "B T D"]
    """What the layer was given."""
    output: Float[Tensor, "B T D"]
    """Context plus what was read from equilibrium and memory; 0 at pads, as are the next three."""
    z: Float[Tensor, "B T D"]
    z_init: Float[Tensor, "B T D"]
    """Where the iteration started; differentiable. An equilibrium does not depend on it, and neither implicit nor
    phantom adjoint passes it a gradient; the unrolled one does, as the end of its steps depends on where they start."""
    retrieved: Float[Tensor, "B T D"]
    """The patterns' average at ``z`` under the retrieval weights, in units of their norm."""
    problem: TokenProblem
    """The rows' energies, maps and Jacobians; ``take(rows)`` for some."""
    solution: Solution
    """Per row."""
    index: Int[Tensor, "N"] | None
    """Place of each row among the ``B T`` tokens; None if each token has one."""
    is_real: Bool[Tensor, "N"] | None
    """Rows of real tokens, where pads have one too; None: all are."""

    def _repr_html_(self) -> str:
        from helmholtz._notebook.equilibrium import equilibrium_html

        return equilibrium_html(self)

    @property
    def field(self) -> TokenField:
        return self.problem.field

    @property
    def parameters(self) -> EnergyParameters:
        return self.problem.parameters

    def rows(self, x: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "N *rest"]:
        """What ``x`` holds at the tokens that have a row."""
        return _rows(x, self.index)

    def scatter(self, x: Shaped[Tensor, "N *rest"], *, pad: float = 0.0) -> Shaped[Tensor, "B T *rest"]:
        """Rows at their places, ``pad`` at pads."""
        return _scatter(x, self.index, self.is_real, self.z.shape[:2], pad)

    @property
    def status(self) -> Int[Tensor, "B T"]:
        """A ``Status`` per token; a pad has nothing to solve and counts as converged."""
        return self.scatter(self.solution.status, pad=int(Status.CONVERGED))

    @property
    def converged(self) -> Bool[Tensor, "B T"]:
        return self.status == int(Status.CONVERGED)

    @property
    def num_steps(self) -> Int[Tensor, "B T"]:
        return self.scatter(self.solution.num_steps)

    @property
    def residual(self) -> Float[Tensor, "B T"]:
        r"""Relative residual :math:`|f(z) - z| / |f(z)|` of each token's fixed-point equation at ``z``.

        Computed when asked for, by one evaluation of the map; ``solution.residual`` is the solver's, without gradient.
        It is differentiable as ``z`` is. Under the implicit adjoint its derivative is 0 up to tolerances: wherever the
        parameters move, there is an equilibrium, at which it is 0. Under the unrolled one it says how to come closer.
        """
        z = self.rows(self.z)
        return self.scatter(relative_residual(z, self.problem.map(z)))

    @property
    def energy(self) -> Float[Tensor, "B T"]:
        r"""Energy of each token at ``z``, differentiable.

        Computed when asked for, by one evaluation; ``solution.energy`` is the solver's, without gradient. At an
        equilibrium :math:`\nabla E(z) = 0`, so that its gradient is that of the coefficients at a fixed ``z``.
        """
        return self.scatter(self.problem.energy(self.rows(self.z)))

    def components(self) -> EnergyComponents:
        """The terms of each row's energy at its equilibrium; their sum is the energy."""
        return energy_components(self.rows(self.z), self.field, self.parameters)

    def weights(self) -> Float[Tensor, "N K"]:
        """Retrieval weights of each row at its equilibrium."""
        return _weights(self.rows(self.z), self.parameters)

    def entropy(self) -> Float[Tensor, "B T"]:
        """Entropy of the retrieval weights in nats."""
        return self.scatter(torch.special.entr(self.weights()).sum(-1))

    def top_pattern(self) -> Int[Tensor, "B T"]:
        """The pattern with the largest weight; 0 at pads."""
        return self.scatter(self.weights().argmax(-1))

    def usage(self) -> Float[Tensor, "K"]:
        """Mean weight of each pattern over the real tokens."""
        weights, real = self.weights(), self.is_real
        return weights.mean(0) if real is None else weights[real].mean(0)

    def certificate(self) -> float:
        """A proven bound of the Lipschitz constant of these tokens' maps; below 1: the equilibria are unique."""
        return contraction_certificate(self.field, self.parameters)


@dataclass(frozen=True, slots=True)
class EquilibriumState:
    """What a stream remembers: the recurrence that feeds the energy. Equilibria are no part of it."""

    recurrence: Float[Tensor, "B H P S"] | None
    """None before the first token."""
    bound: Float[Tensor, "1"] | None = field(default=None, metadata=KEPT)
    """Of the spectral norm of the dynamics' weight, worked out once per stream where no gradients are taken."""


@final
class EquilibriumLayer(nn.Module):
    r"""Each token's equilibrium :math:`z^* = f(z^*)` given its causal context, read together with the memory.

    :math:`o = c + W_o\,[z^*, r]` with :math:`r = \sum_i p_i(z^*)\, m_i / R`. Tokens are solved one by one: a token's
    result, its number of steps and its gradient depend on no other token's, converged or not. Gradients are those of
    ``config.adjoint`` and the same in training and evaluation mode.

    Attributes:
        solver: how equilibria are found; ``config.solver`` until another ``SolverConfig`` is assigned.
        adjoint: how they are differentiated.
        observer: called with the ``Solution`` of every call, to count over many; None at first.
    """

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__()
        self.config = c = config
        self._solver = c.solver
        self.adjoint = _adjoint(c)
        self.observer: Callable[[Solution], None] | None = None
        self.dynamics = TokenDynamics(c)
        self.memory = HopfieldMemory(
            c.d_model, c.n_patterns, n_slots=c.n_slots, beta=c.beta, policy=c.slot_policy, novelty=c.novelty
        )
        self.o_proj = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        init_normal(self.o_proj)

    @property
    def solver(self) -> SolverConfig:
        return self._solver

    @solver.setter
    def solver(self, solver: SolverConfig) -> None:
        check(isinstance(solver, SolverConfig), "solver", solver, "a SolverConfig")
        self._solver = solver

    def forward(
        self,
        c: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        *,
        state: EquilibriumState | None = None,
        z_init: Shaped[Tensor, "..."] | None = None,
    ) -> Equilibrium | tuple[Equilibrium, EquilibriumState]:
        """Equilibria of a whole sequence or, given a state, of the next tokens of a stream: those of the whole.

        Args:
            c: context, 0 at pads.
            state: what the stream left behind; then the next state is returned too.
            z_init: where to start, ``B T D`` or ``B D`` for all tokens of a row; None starts at ``W_0 c``. In the
                descent regime it selects the attractor.

        Raises: ValueError for a ``z_init`` of another shape, and if it or the context is not finite at a real token.
        """
        recurrence, bound = (None, None) if state is None else (state.recurrence, state.bound)
        dynamics = self.dynamics(c, layout, self.memory(), recurrence, bound)
        found = self._equilibrium(c, dynamics, z_init)
        if state is None:
            return found
        return found, EquilibriumState(dynamics.state, None if torch.is_grad_enabled() else dynamics.bound)

    def init_state(self, batch_size: int) -> EquilibriumState:
        """The state before the first token."""
        return EquilibriumState(None)

    def _equilibrium(
        self, c: Float[Tensor, "B T D"], dynamics: Dynamics, z_init: Tensor | None
    ) -> Equilibrium:
        index, places = dynamics.index, (dynamics.index, dynamics.is_real, c.shape[:2])
        start = _rows(dynamics.start if z_init is None else _given_start(z_init, dynamics.start), index)
        if worth_reading(start) and not start.isfinite().all():
            name = "z_init" if z_init is not None else "the context"
            raise NonFiniteInputError(f"{name} must be finite at every real token, got NaN or infinity")
        with full_precision(c.device):
            problem = TokenProblem(dynamics.field, dynamics.parameters)
            solution = solve(problem, start, self.solver)
            if self.observer is not None:
                self.observer(solution)
            z = self.adjoint.attach(problem, solution)
            retrieved = _weights(z, problem.parameters) @ problem.parameters.patterns / self.memory.radius
        read = self.o_proj(torch.cat([z, retrieved], dim=-1).to(c.dtype))
        return Equilibrium(
            context=c,
            output=c + _scatter(read, *places).to(c.dtype),
            z=_scatter(z, *places),
            z_init=_scatter(start, *places),
            retrieved=_scatter(retrieved, *places),
            problem=problem,
            solution=solution,
            index=index,
            is_real=dynamics.is_real,
        )


def _given_start(z_init: Tensor, like: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    batch, time, width = like.shape
    if tuple(z_init.shape) not in ((batch, time, width), (batch, width)):
        raise ValueError(
            f"z_init: wanted shape {(batch, time, width)} or {(batch, width)}, got {tuple(z_init.shape)}"
        )
    check(z_init.is_floating_point(), "z_init", z_init.dtype, "of a floating-point dtype")
    z_init = z_init.to(like.dtype)
    return z_init if z_init.ndim == 3 else z_init.unsqueeze(1).expand_as(like)


def _weights(z: Float[Tensor, "N D"], parameters: EnergyParameters) -> Float[Tensor, "N K"]:
    return hopfield_weights(z, parameters.patterns, parameters.beta, parameters.log_prior)


def _rows(x: Shaped[Tensor, "B T *rest"], index: Tensor | None) -> Shaped[Tensor, "N *rest"]:
    x = x.flatten(0, 1)
    return x if index is None else x[index]


def _scatter(
    x: Shaped[Tensor, "N *rest"],
    index: Tensor | None,
    is_real: Tensor | None,
    shape: torch.Size,
    pad: float = 0.0,
) -> Shaped[Tensor, "B T *rest"]:
    if is_real is not None:
        x = choose(is_real, x, x.new_full(x.shape, pad))
    if index is not None:
        x = x.new_full((shape.numel(), *x.shape[1:]), pad).index_copy(0, index, x)
    return x.unflatten(0, tuple(shape))


def _adjoint(config: EquilibriumConfig) -> AbstractAdjoint:
    assert config.adjoint_steps is not None and config.adjoint_on_nonconvergence is not None
    if config.adjoint != "implicit":
        adjoint = Phantom if config.adjoint == "phantom" else Unrolled
        return adjoint(n_steps=config.adjoint_steps)
    return Implicit(max_steps=config.adjoint_steps, on_nonconvergence=config.adjoint_on_nonconvergence)
