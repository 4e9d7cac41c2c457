"""Sizes and choices of an equilibrium layer."""

from dataclasses import dataclass
from typing import Literal, get_args

from helmholtz._checks import check, check_choice, check_divides, check_integer, check_positive
from helmholtz.layers.hopfield import MemoryPolicy
from helmholtz.solvers import SolverConfig
from helmholtz.solvers.base import ON_NONCONVERGENCE, OnNonconvergence

Stability = Literal["contractive", "descent"]
"""One equilibrium per token by construction, or an energy that only has to fall."""
AdjointName = Literal["implicit", "phantom", "unrolled"]

ADJOINT_STEPS: dict[str, int] = {"implicit": 50, "phantom": 5, "unrolled": 30}
"""Steps of each adjoint where none are given."""


@dataclass(frozen=True, kw_only=True)
class EquilibriumSettings:
    """The memory, and how equilibria are found and differentiated, whatever the sizes. Fields left None are filled in.

    Without slots: it is the second base of configs that have them.
    """

    n_patterns: int = 1024
    """Learned patterns of the memory."""
    n_slots: int = 0
    """Writable patterns of the memory."""
    slot_policy: MemoryPolicy = "fifo"
    """What happens to a pattern when all slots are full, or when it is not novel; see ``HopfieldMemory``."""
    novelty: float = 0.9
    """A new pattern is novel if its cosine to every written one is below this."""
    beta: float = 2.0
    """Inverse temperature of retrieval: the logit of a pattern on itself is beta sqrt(d_model)."""
    stability: Stability = "contractive"
    """"contractive": one equilibrium per token, certified. "descent": several, chosen by the start."""
    solver: SolverConfig = SolverConfig()
    """How equilibria are found."""
    adjoint: AdjointName = "implicit"
    """Gradient by the implicit function theorem, by a few steps from the equilibrium, or through all steps."""
    adjoint_steps: int | None = None
    """Largest number of steps: of conjugate gradients for implicit (default 50), from the equilibrium for phantom (5),
    from the start for unrolled (30)."""
    adjoint_on_nonconvergence: OnNonconvergence | None = None
    """What an implicit gradient does whose linear system was not solved: raise, or warn in the descent regime, where a
    token may end on a saddle."""

    def __post_init__(self) -> None:
        check_integer("n_patterns", self.n_patterns)
        check_integer("n_slots", self.n_slots, minimum=0)
        check_choice("slot_policy", self.slot_policy, get_args(MemoryPolicy))
        check(0 < self.novelty <= 1, "novelty", self.novelty, "in (0, 1]")
        check_positive("beta", self.beta)
        check_choice("stability", self.stability, get_args(Stability))
        check_choice("adjoint", self.adjoint, ADJOINT_STEPS)
        if self.adjoint_steps is None:
            object.__setattr__(self, "adjoint_steps", ADJOINT_STEPS[self.adjoint])
        check_integer("adjoint_steps", self.adjoint_steps)
        if self.adjoint_on_nonconvergence is None:
            default = "warn" if self.stability == "descent" else "raise"
            object.__setattr__(self, "adjoint_on_nonconvergence", default)
        check_choice("adjoint_on_nonconvergence", self.adjoint_on_nonconvergence, ON_NONCONVERGENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EquilibriumConfig(EquilibriumSettings):
    """What an ``EquilibriumLayer`` is made of."""

    d_model: int
    """Width of context and equilibrium."""
    d_inner: int
    """Channels of the state-space term of the energy."""
    d_state: int = 64
    """States per channel of its recurrence."""
    d_head: int = 64
    """Channels that share a decay; a divisor of d_inner."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_inner", "d_state"):
            check_integer(name, getattr(self, name))
        check_divides("d_head", self.d_head, "d_inner", self.d_inner)
        EquilibriumSettings.__post_init__(self)
