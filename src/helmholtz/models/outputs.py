"""What a decoder gives and what it remembers, part by part."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumState
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.layers.state import KEPT, Room, both_masks


@dataclass(frozen=True, slots=True)
class PlanState:
    """Of every token of a stream so far: its code, and if a prompt is to be encoded again what the encoder reads."""

    code: Int[Tensor, "B S"]
    hidden: Float[Tensor, "B S D"] | None
    """None of a stream whose later tokens the encoder will not read."""
    mask: Bool[Tensor, "B S"] | None
    """Real tokens of ``hidden``; None while all are."""
    room: Room = field(default_factory=Room, compare=False, repr=False)

    def append(
        self, code: Int[Tensor, "B T"], x: Float[Tensor, "B T D"], layout: SequenceLayout
    ) -> "PlanState":
        """The state after tokens of these codes and vectors; this one is unchanged."""
        code = code if self.code.shape[1] else code.clone()  # the caller's, who may use it for something else
        if self.hidden is None:
            (code,), room = self.room.append((self.code,), (code,), capacity=layout.capacity)
            return PlanState(code, None, None, room)
        before, after = both_masks(self.mask, self.hidden, layout.mask, x)
        held, new = (self.code, self.hidden, *before), (code, x, *after)
        (code, hidden, *mask), room = self.room.append(held, new, capacity=layout.capacity)
        return PlanState(code, hidden, mask[0] if mask else None, room)


@dataclass(frozen=True, slots=True)
class LMState:
    """What a decoder remembers of a stream: a state per block, and the real tokens each row has seen."""

    blocks: tuple[Any, ...]
    position: Int[Tensor, "B"]
    plan: PlanState | None = None
    """None of a model without a plan."""
    equilibrium: EquilibriumState | None = None
    """The recurrence that feeds the energy; None of a model without an equilibrium."""
    n_read: int = field(default=0, metadata=KEPT)
    """Tokens read, pads included."""
    length: int | None = field(default=None, metadata=KEPT)
    """Tokens that there will be at most, for which caches are allocated; None where that is not known."""


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Next-token logits, 0 at pads, and the state of the stream if there is one."""

    logits: Float[Tensor, "B T vocab"]
    state: LMState | None = None
    equilibrium: Equilibrium | None = None
    """What the logits were read from; None of a model without an equilibrium."""


@dataclass(frozen=True, slots=True)
class LMLoss:
    """What a decoder gives that was told the tokens to come: their cross-entropy in place of the logits."""

    nats: Float[Tensor, ""]
    """Mean over the tokens that count."""
    state: LMState | None = None
    equilibrium: Equilibrium | None = None


@dataclass(frozen=True, slots=True)
class LowerOutput:
    """Tokens after the blocks below the plan, on their own or as the next ones of a stream."""

    x: Float[Tensor, "B T D"]
    layout: SequenceLayout
    before: LMState | None
    """The stream before these tokens."""
    lower_states: tuple[Any, ...] = ()
    """Its lower blocks after them."""
