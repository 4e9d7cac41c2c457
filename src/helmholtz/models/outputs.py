"""What a decoder gives and what it remembers, part by part."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumState
from helmholtz.layers.sequence import SequenceLayout


@dataclass(frozen=True, slots=True)
class PlanState:
    """Of every token of a stream so far: its code, and what the encoder would read of it."""

    code: Int[Tensor, "B S"]
    hidden: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"] | None
    """Real tokens; None while all are."""


@dataclass(frozen=True, slots=True)
class LMState:
    """What a decoder remembers of a stream: a state per block, and the real tokens each row has seen."""

    blocks: tuple[Any, ...]
    position: Int[Tensor, "B"]
    plan: PlanState | None = None
    """None of a model without a plan."""
    equilibrium: EquilibriumState | None = None
    """The recurrence that feeds the energy; None of a model without an equilibrium."""


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Next-token logits, 0 at pads, and the state of the stream if there is one."""

    logits: Float[Tensor, "B T vocab"]
    state: LMState | None = None
    equilibrium: Equilibrium | None = None
    """What the logits were read from; None of a model without an equilibrium."""


@dataclass(frozen=True, slots=True)
class LowerOutput:
    """Tokens after the blocks below the plan, on their own or as the next ones of a stream."""

    x: Float[Tensor, "B T D"]
    layout: SequenceLayout
    before: LMState | None
    """The stream before these tokens."""
    lower_states: tuple[Any, ...] = ()
    """Its lower blocks after them."""
