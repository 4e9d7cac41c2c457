"""What a layer remembers between calls: frozen dataclasses of tensors whose first dimension is the batch."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._once import is_traced
from helmholtz.layers.sequence import SequenceLayout

StateT = TypeVar("StateT")
Parts = tuple[Tensor, ...]

KEPT = {"kept": True}
"""Metadata of a state's fields that say nothing about rows; ``map_state`` leaves them as they are."""


@final
class Room:
    """Memory behind the tensors of a state for the tokens to come, allocated once and not for every token.

    Only one state may write there, the first that is made of this one: another is a copy. So tensors that were handed
    out never change, and a state may be continued twice. With gradients on nothing is written in place, as autograd
    may have kept what would change.
    """

    def __init__(self, held: Parts = (), buffers: Parts = ()) -> None:
        # a list, as its pop gives an element to one thread alone
        self._free = [(held, buffers)] if buffers else []

    def append(self, held: Parts, new: Parts, *, capacity: int | None = None) -> tuple[Parts, "Room"]:
        """``held`` and behind each of its tensors that of ``new``, along time; and the room behind the results.

        Args:
            held: ``B ... S D``, or ``B S``; of no tokens, the first ones decide dtype and device.
            capacity: tokens to allocate memory for; None or too few: twice those that there are.

        Cost: O(T), and a copy of ``held`` where this is not its first continuation or the memory is full.
        """
        before, added = _length(held[0]), _length(new[0])
        after = before + added
        known = capacity if capacity is not None and capacity >= after else None
        in_graph = torch.is_grad_enabled() or is_traced()
        if not before and (in_graph or known is None):
            return new, Room()
        if in_graph:
            pairs = zip(held, new, strict=True)
            return tuple(torch.cat([h, x], dim=_time(x)) for h, x in pairs), Room()
        buffers = self._take(held, new, after)
        if buffers is None:
            size = known or 2 * after
            buffers = tuple(_allocated(h, x, size) for h, x in zip(held, new, strict=True))
        parts = []
        for buffer, x in zip(buffers, new, strict=True):
            dim = _time(x)
            buffer.narrow(dim, before, added).copy_(x)
            parts.append(buffer.narrow(dim, 0, after))
        held = tuple(parts)
        return held, Room(held, buffers)

    def take(self, held: Parts, new: Parts, after: int) -> Parts | None:
        """The memory behind ``held`` for a caller who writes what follows there, up to ``after`` tokens in all.

        None if another continuation has it, or if it does not fit ``new``, of which dtype and device matter.
        """
        return None if torch.is_grad_enabled() or is_traced() else self._take(held, new, after)

    def _take(self, held: Parts, new: Parts, after: int) -> Parts | None:
        """The memory behind ``held``, if nobody has it and it takes ``new``."""
        try:
            owners, buffers = self._free.pop()
        except IndexError:
            return None
        if len(owners) != len(held) or any(map(operator.is_not, owners, held)):
            self._free.append((owners, buffers))  # of other tensors: those of the state were replaced
            return None
        return buffers if _fit(buffers, new, after) else None


def _time(x: Tensor) -> int:
    return 1 if x.ndim == 2 else x.ndim - 2


def _length(x: Tensor) -> int:
    return x.shape[1 if x.ndim == 2 else -2]


def _fit(buffers: Parts, new: Parts, after: int) -> bool:
    if _length(buffers[0]) < after:
        return False
    in_inference = torch.is_inference_mode_enabled()
    for buffer, x in zip(buffers, new, strict=True):
        kept, given = buffer.dtype, x.dtype
        wide = kept == given or kept == torch.promote_types(kept, given)
        if not wide or buffer.device != x.device or (buffer.is_inference() and not in_inference):
            return False
    return True


def _allocated(held: Tensor, x: Tensor, size: int) -> Tensor:
    """Memory for ``size`` tokens that begins with ``held``."""
    dim, before = _time(x), _length(held)
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    buffer = x.new_empty(shape, dtype=torch.promote_types(held.dtype, x.dtype) if before else x.dtype)
    if before:
        buffer.narrow(dim, 0, before).copy_(held)
    return buffer


def both_masks(mask: Tensor | None, held: Tensor, new: Tensor | None, x: Tensor) -> tuple[Parts, Parts]:
    """Real tokens of ``held`` and of ``x``, whose masks are None while all are; nothing if both are None."""
    given = new if mask is None else mask
    if given is None:
        return (), ()
    first, second = (
        given.new_ones(len(tokens), _length(tokens)) if real is None else real
        for real, tokens in ((mask, held), (new, x))
    )
    return (first,), (second,)


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every token so far, pads included."""

    k: Float[Tensor, "B G S K"]
    v: Float[Tensor, "B G S V"]
    mask: Bool[Tensor, "B S"] | None
    """Real tokens; None while all are."""
    position: Int[Tensor, "B"]
    """Real tokens each row has seen: the position of its next one."""
    room: Room = field(default_factory=Room, compare=False, repr=False)

    @staticmethod
    def empty(position: Int[Tensor, "B"], groups: int, d_head: int, d_head_v: int) -> "KVCache":
        """The cache before the first token, which decides its dtype and device."""
        batch_size = len(position)
        return KVCache(
            k=torch.zeros(batch_size, groups, 0, d_head, device=position.device),
            v=torch.zeros(batch_size, groups, 0, d_head_v, device=position.device),
            mask=None,
            position=position,
        )

    def append(
        self,
        k: Float[Tensor, "B G T K"],
        v: Float[Tensor, "B G T V"],
        mask: Bool[Tensor, "B T"] | None = None,
        *,
        capacity: int | None = None,
        position: Int[Tensor, "B"] | None = None,
    ) -> "KVCache":
        """The cache after these tokens; this one is unchanged. Cost and ``capacity`` as of ``Room.append``.

        Args:
            position: after these tokens, where it has been counted (``SequenceLayout.advance``).
        """
        if position is None:
            position = self.position.to(k.device) + (k.shape[2] if mask is None else mask.sum(-1))
        before, after = both_masks(self.mask, self.k, mask, k)
        held, new = (self.k, self.v, *before), (k, v, *after)
        (k, v, *masks), room = self.room.append(held, new, capacity=capacity)
        return KVCache(k, v, masks[0] if masks else None, position, room)

    def claim(self, like: Float[Tensor, "B T C"], mask: Bool[Tensor, "B T"] | None) -> Parts | None:
        """Memory of keys, values and, if the cache has one, mask, behind which the tokens of ``like`` will be written.

        None where the next cache has to be memory of its own (``append``).
        """
        after = self.k.shape[2] + like.shape[1]
        if self.mask is not None:
            return self.room.take((self.k, self.v, self.mask), (like, like, self.mask), after)
        return self.room.take((self.k, self.v), (like, like), after) if mask is None else None

    def grown(self, memory: Parts, layout: SequenceLayout) -> "KVCache":
        """The cache of what ``claim`` gave, once the keys and values of these tokens are written there."""
        before = self.k.shape[2]
        after = before + layout.positions.shape[-1]
        position = layout.advance(self.position)
        k, v = memory[0].narrow(2, 0, after), memory[1].narrow(2, 0, after)
        if self.mask is None:
            return KVCache(k, v, None, position, Room((k, v), memory))
        mask = memory[2].narrow(1, 0, after)
        mask[:, before:] = True if layout.mask is None else layout.mask
        return KVCache(k, v, mask, position, Room((k, v, mask), memory))


def map_state(fn: Callable[[Tensor], Tensor], state: StateT) -> StateT:
    """Apply ``fn`` to every tensor of a state: ``map_state(lambda x: x[rows], state)`` reorders rows.

    Walks dataclasses, tuples, lists and None; anything else is a TypeError. Memory for later tokens stays behind.
    """
    return _map(fn, state)


def _map(fn: Callable[[Tensor], Tensor], node: Any) -> Any:
    if isinstance(node, Tensor):
        return fn(node)
    if node is None:
        return None
    if isinstance(node, Room):
        return Room()
    if isinstance(node, tuple | list):
        return type(node)(_map(fn, item) for item in node)
    if is_dataclass(node) and not isinstance(node, type):
        mapped = [f.name for f in fields(node) if "kept" not in f.metadata]
        return replace(node, **{name: _map(fn, getattr(node, name)) for name in mapped})
    raise TypeError(f"state: wanted tensors in dataclasses or tuples, found a {type(node).__name__}")
