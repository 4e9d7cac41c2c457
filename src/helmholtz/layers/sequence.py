"""Which tokens of a batch are real, where sequences start, and where each token stands."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from helmholtz._values import free_to_read
from helmholtz.ops.rope import rope_table


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The geometry of one call, worked out once from masks, packing and the tokens seen before."""

    mask: Bool[Tensor, "B T"] | None
    """Real tokens; None means all."""
    reset: Bool[Tensor, "B T"] | None
    """First tokens of packed sequences; None means that nothing starts anew."""
    cu_seqlens: Int[Tensor, "n1"] | None
    """Boundaries of the packed sequences, as the caller gave them."""
    positions: Int[Tensor, "*BT"]
    """Position of each token among the real tokens of its sequence: ``T``, or ``B T`` where rows differ."""
    capacity: int | None = None
    """Tokens for which a stream's caches are allocated; None where that is not known."""
    _rotations: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _advanced: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)

    def rotation(self, width: int, theta: float) -> tuple[Float[Tensor, "*BT K"], Float[Tensor, "*BT K"]]:
        """The ``rope_table`` of these positions, made once for all layers that share the layout."""
        key = (width, theta)
        if key not in self._rotations:
            self._rotations[key] = rope_table(self.positions, width, theta=theta)
        return self._rotations[key]

    def advance(self, position: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Real tokens seen once this call is over, given those seen before it: one tensor for all layers that give the
        same one."""
        for before, after in self._advanced:
            if before is position:
                return after
        added = self.positions.shape[-1] if self.mask is None else self.mask.sum(-1)
        after = position.to(self.positions.device) + added
        self._advanced.append((position, after))
        return after


def zero_pads(x: Float[Tensor, "B T D"], layout: SequenceLayout) -> Float[Tensor, "B T D"]:
    """Whatever a pad holds, NaN included, made 0."""
    return x if layout.mask is None else x.masked_fill(~layout.mask.unsqueeze(-1), 0)


def sequence_layout(
    x: Shaped[Tensor, "B T *rest"],
    attention_mask: Shaped[Tensor, "..."] | None = None,
    cu_seqlens: Shaped[Tensor, "..."] | None = None,
    position: Int[Tensor, "rows"] | None = None,
    capacity: int | None = None,
) -> SequenceLayout:
    """Validate the masks of a call and place its tokens.

    Args:
        x: the tokens or their vectors; only their number and device matter.
        attention_mask: bool or integer ``B T``, non-zero where a token is real. Any pattern.
        cu_seqlens: integer ``n+1``, from 0 to T, increasing; then ``B = 1``.
        position: real tokens each row has seen before this call; None at the start of a sequence.
        capacity: tokens that the stream will have which these continue, if that is known.

    Raises: ValueError naming the argument for a wrong dtype, shape or combination, and for bounds in another order
        where they can be read at no cost: on the CPU, outside of a compiled graph.
    """
    batch, time = x.shape[:2]
    if position is not None and len(position) != batch:
        raise ValueError(f"state: it belongs to {len(position)} rows, the input has {batch}")
    position = None if position is None else position.to(x.device)
    if time == 1 and position is not None and attention_mask is None and cu_seqlens is None:
        return SequenceLayout(None, None, None, position.unsqueeze(1), capacity)  # a step of a stream
    index = torch.arange(time, device=x.device)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("cu_seqlens and attention_mask exclude each other: a packed row has no pads")
        starts = _starts(cu_seqlens, batch, time)
        reset = torch.zeros(1, time, dtype=torch.bool, device=x.device)
        reset[0, starts] = True
        positions = index - torch.where(reset[0], index, 0).cummax(0).values
        return SequenceLayout(None, reset, cu_seqlens, positions)
    mask = None if attention_mask is None else _real(attention_mask, batch, time)
    positions = index if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    if position is not None:
        positions = positions + position[:, None]
    return SequenceLayout(mask, None, None, positions, capacity)


def _real(mask: Tensor, batch: int, time: int) -> Bool[Tensor, "B T"]:
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"attention_mask: wanted bool or integer (non-zero = real token), got {mask.dtype}")
    if tuple(mask.shape) != (batch, time):
        raise ValueError(
            f"attention_mask: wanted shape {(batch, time)} as the input's, got {tuple(mask.shape)}"
        )
    return mask != 0


def _starts(cu_seqlens: Tensor, batch: int, time: int) -> Int[Tensor, "n"]:
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed sequences lie end to end in one row, got a batch of {batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(
            f"cu_seqlens: wanted a 1-D integer tensor, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if free_to_read(cu_seqlens):
        bounds = cu_seqlens.tolist()
        increasing = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time or not increasing:
            raise ValueError(f"cu_seqlens: wanted increasing bounds from 0 to {time}, got {bounds}")
    return cu_seqlens[:-1].long()


def reversed_reset(reset: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B T"] | None:
    """The resets of the same sequences read from the last token to the first."""
    return None if reset is None else reset.roll(-1, dims=1).flip(1)
