"""Vectors that go into, come out of and are left out of one call of a decoder, through hooks on its modules."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from helmholtz.models.decoder import Decoder


@contextlib.contextmanager
def tapped(
    model: Decoder, *, embeds: Tensor | None, keep: Callable[[Tensor], Tensor] | None, hidden: bool
) -> Iterator[list[Tensor]]:
    """While open, calls of ``model`` in this thread differ in three ways.

    Args:
        embeds: instead of the embeddings of the tokens.
        keep: of the vectors ``B T D`` before the output matrix, those that get logits, as ``B T D``.
        hidden: what enters each block, and what leaves the last norm, is put into the list that is given.
    """
    thread, found = threading.get_ident(), list[Tensor]()

    def here(hook: Callable[..., Any]) -> Callable[..., Any]:
        """Other threads may be using the same model."""
        return lambda *args: hook(*args) if threading.get_ident() == thread else None

    handles = []
    if embeds is not None:
        handles.append(model.embed.register_forward_hook(here(lambda module, args, output: embeds)))
    if keep is not None:
        handles.append(model.unembed.register_forward_pre_hook(here(lambda module, args: (keep(args[0]),))))
    if hidden:
        for block in model.blocks:
            handles.append(block.register_forward_pre_hook(here(lambda module, args: found.append(args[0]))))
        handles.append(
            model.norm.register_forward_hook(here(lambda module, args, output: found.append(output)))
        )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def keeper(
    logits_to_keep: int | Tensor, as_given: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """``keep`` of ``tapped``; None keeps all. Of a mask ``B T`` what is kept lies in one row."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return None

    def keep(x: Tensor) -> Tensor:
        kept = slice_logits_to_keep(as_given(x), logits_to_keep)
        return kept if kept.ndim == 3 else kept.unsqueeze(0)

    return keep


def is_flat(logits_to_keep: int | Tensor) -> bool:
    """Whether it is a mask, of which transformers wants the kept logits of all rows in one list."""
    return (
        isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool
    )
