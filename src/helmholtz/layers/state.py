"""What a layer remembers between calls: frozen dataclasses of tensors whose first dimension is the batch."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

StateT = TypeVar("StateT")


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every token so far, pads included."""

    k: Float[Tensor, "B G S K"]
    v: Float[Tensor, "B G S V"]
    mask: Bool[Tensor, "B S"] | None
    """Real tokens; None while all are."""
    position: Int[Tensor, "B"]
    """Real tokens each row has seen: the position of its next one."""

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
    ) -> "KVCache":
        """The cache after these tokens; this one is unchanged. Cost: copies what it holds, O(S + T)."""
        position = self.position.to(k.device) + (k.shape[2] if mask is None else mask.sum(-1))
        if self.k.shape[2] == 0:
            return KVCache(k, v, mask, position)
        joined = None
        if self.mask is not None or mask is not None:
            joined = torch.cat([_all_real(self.k, self.mask), _all_real(k, mask)], dim=1)
        return KVCache(
            k=torch.cat([self.k, k], dim=2),
            v=torch.cat([self.v, v], dim=2),
            mask=joined,
            position=position,
        )


def _all_real(k: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask


def map_state(fn: Callable[[Tensor], Tensor], state: StateT) -> StateT:
    """Apply ``fn`` to every tensor of a state: ``map_state(lambda x: x[rows], state)`` reorders rows.

    Walks dataclasses, tuples, lists and None; anything else is a TypeError.
    """
    return _map(fn, state)


def _map(fn: Callable[[Tensor], Tensor], node: Any) -> Any:
    if isinstance(node, Tensor):
        return fn(node)
    if node is None:
        return None
    if isinstance(node, tuple | list):
        return type(node)(_map(fn, item) for item in node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{f.name: _map(fn, getattr(node, f.name)) for f in fields(node)})
    raise TypeError(f"state: wanted tensors in dataclasses or tuples, found a {type(node).__name__}")
