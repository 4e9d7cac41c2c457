"""The contract of everything that lets tokens look at each other."""

import abc
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz.layers.sequence import SequenceLayout, sequence_layout


@runtime_checkable
class Positioned(Protocol):
    """What every mixer's state tells."""

    @property
    def position(self) -> Int[Tensor, "B"]:
        """Real tokens each row has seen."""


StateT = TypeVar("StateT", bound=Positioned)


class AbstractMixer(nn.Module, abc.ABC, Generic[StateT]):
    """Mixes tokens along time. Pads influence nothing and come out as exactly 0.

    ``step(prompt, init_state(B))`` and further steps give what ``forward`` gives on the whole. Subclasses are
    final and project their result through ``o_proj``, which writes into the residual stream.
    """

    o_proj: nn.Linear

    @abc.abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix a whole sequence.

        Args:
            attention_mask: bool or integer ``B T``, non-zero where a token is real; any pattern.
            cu_seqlens: integer ``n+1``, bounds of sequences packed end to end in one row; excludes the mask.
        """

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> StateT:
        """The state before the first token. Raises: ValueError if the mixer is not causal."""

    @abc.abstractmethod
    def extend(
        self, x: Float[Tensor, "B T D"], state: StateT, layout: SequenceLayout
    ) -> tuple[Float[Tensor, "B T D"], StateT]:
        """``step``, with the layout of the call already worked out: by a model, once for all its layers."""

    def step(
        self, x: Float[Tensor, "B T D"], state: StateT, *, attention_mask: Shaped[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "B T D"], StateT]:
        """Mix the next one or many tokens of a stream; the state given is left unchanged."""
        return self.extend(x, state, sequence_layout(x, attention_mask, position=state.position))
