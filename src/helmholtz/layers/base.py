"""The contract of everything that lets tokens look at each other."""

import abc
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz.layers.sequence import SequenceLayout, sequence_layout, zero_pads


@runtime_checkable
class Positioned(Protocol):
    """What every mixer's state tells."""

    @property
    def position(self) -> Int[Tensor, "B"]:
        """Real tokens each row has seen."""


StateT = TypeVar("StateT", bound=Positioned)


class AbstractMixer(nn.Module, abc.ABC, Generic[StateT]):
    """Mixes tokens along time. Pads influence nothing and come out as exactly 0.

    ``forward`` is the one entry: models, blocks and ``step`` call the module, so that hooks, adapters,
    parametrisations, quantised and offloaded weights act wherever the mixer is used. Subclasses implement ``_mix``
    behind it, call their own modules in turn, never their weights, and project their result through ``o_proj``, which
    writes into the residual stream.
    """

    d_model: int
    causal: bool
    o_proj: nn.Linear

    def forward(
        self,
        x: Float[Tensor, "#B #T D"],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        layout: SequenceLayout | None = None,
        state: StateT | None = None,
        source: Float[Tensor, "_ _ _"] | None = None,
    ) -> Float[Tensor, "B T D"] | tuple[Float[Tensor, "B T D"], StateT]:
        """Mix a whole sequence or, given a state, the next tokens of a stream. A batch of no tokens gives none.

        Args:
            attention_mask: bool or integer ``B T``, non-zero where a token is real; any pattern.
            cu_seqlens: integer ``n+1``, bounds of sequences packed end to end in one row; excludes a mask and a state.
            layout: mask, packing and positions of the call, already worked out: by a model, once for all its layers.
            state: what earlier tokens left behind; it stays unchanged. Any split of a sequence into calls gives what
                one call on the whole gives.
            source: a second stream, token by token in the same places. What writes into the mixer (keys, values,
                decays) is made of it, what reads (queries, gates) of ``x``, which then may also be one vector for all
                tokens, ``1 1 D``. None means ``x``.

        Returns: the result, or ``(result, state after these tokens)`` if a state was given.
        Raises: ValueError naming the argument for a shape, dtype or combination that cannot be mixed.
        """
        self._check_width("x", x)
        written = x if source is None else self._check_source(x, source)
        layout = self._layout(written, attention_mask, cu_seqlens, layout, state)
        if not written.numel():
            return written if state is None else (written, state)
        if layout.mask is not None:
            x = zero_pads(x, layout) if x.shape[:2] == written.shape[:2] else x
            source = None if source is None else zero_pads(source, layout)
        y, after = self._mix(x, source, layout, state)
        y = zero_pads(y, layout)
        return y if state is None else (y, after)

    def step(
        self, x: Float[Tensor, "B T D"], state: StateT, *, attention_mask: Shaped[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "B T D"], StateT]:
        """``forward`` with a state: the next one or many tokens of a stream."""
        result: tuple[Tensor, StateT] = self(x, attention_mask=attention_mask, state=state)
        return result

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> StateT:
        """The state before the first token. Raises: ValueError if the mixer is not causal."""

    @abc.abstractmethod
    def _mix(
        self,
        x: Float[Tensor, "#B #T D"],
        source: Float[Tensor, "B T D"] | None,
        layout: SequenceLayout,
        state: StateT | None,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """``forward``, with the arguments checked and pads at 0 in ``x`` and ``source``; pads may come out as anything.

        Returns: the result, and the next state if one was given; without one the second is not looked at.
        """

    def _layout(
        self,
        x: Float[Tensor, "B T D"],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        layout: SequenceLayout | None,
        state: StateT | None,
    ) -> SequenceLayout:
        if state is not None:
            self._check_causal("state")
            if cu_seqlens is not None:
                check(False, "cu_seqlens", cu_seqlens, "None with a state: its rows are one sequence each")
        if layout is None:
            position = None if state is None else state.position
            return sequence_layout(x, attention_mask, cu_seqlens, position)
        if attention_mask is not None or cu_seqlens is not None:
            check(False, "layout", "also attention_mask or cu_seqlens", "alone: it holds both")
        return layout

    def _check_causal(self, name: str) -> None:
        if not self.causal:
            raise ValueError(
                f"{name}: a mixer with causal=False reads the whole sequence at once and has no stream"
            )

    def _check_width(self, name: str, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"{name}: wanted shape (B, T, d_model={self.d_model}), got {tuple(x.shape)}")

    def _check_source(self, x: Tensor, source: Tensor) -> Tensor:
        fits = (
            x.shape[:2] in (source.shape[:2], (1, 1)) and source.ndim == 3 and source.shape[2] == self.d_model
        )
        if not fits:
            raise ValueError(f"source: wanted shape {tuple(x.shape)} as x has, got {tuple(source.shape)}")
        return source

    def _start(self, batch_size: int, device: torch.device) -> Int[Tensor, "B"]:
        """The position of a stream's first token."""
        self._check_causal("init_state")
        return torch.zeros(batch_size, dtype=torch.long, device=device)
