"""Which tokens a decoder can read. Values are looked at where that costs nothing: on the CPU, outside graphs."""

import torch
from torch import Tensor

from helmholtz._values import free_to_read
from helmholtz.layers.sequence import SequenceLayout


def check_tokens(tokens: Tensor) -> None:
    """Integers ``B T``."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens: wanted int32 or int64 ids, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens: wanted shape (B, T), got {tuple(tokens.shape)}")


def check_targets(targets: Tensor, shape: tuple[int, ...], vocab_size: int) -> None:
    """Integers, one per token: ids of the vocabulary, or -100."""
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets: wanted int32 or int64 ids, got {targets.dtype}")
    if tuple(targets.shape) != shape:
        raise ValueError(f"targets: wanted shape {shape} as the tokens', got {tuple(targets.shape)}")
    if free_to_read(targets):
        _check_ids(
            "targets", targets.masked_fill(targets == -100, 0), vocab_size, ", or -100 where none counts"
        )


def check_length(layout: SequenceLayout, position: Tensor | None, max_seq_len: int) -> None:
    """No sequence is longer, the ``position`` tokens that a stream has seen included."""
    if layout.mask is None and layout.cu_seqlens is None and position is None:
        longest = layout.positions.shape[-1]
    elif not free_to_read(layout.positions):
        return
    elif layout.cu_seqlens is not None:
        longest = int(layout.cu_seqlens.diff().max())
    else:
        seen = layout.positions.new_zeros(len(layout.positions)) if position is None else position
        longest = max(layout.advance(seen.to(layout.positions.device)).tolist(), default=0)
    if longest > max_seq_len:
        raise ValueError(f"tokens: a sequence of {longest} tokens is longer than max_seq_len={max_seq_len}")


def check_vocabulary(tokens: Tensor, vocab_size: int) -> None:
    """Every id is in the vocabulary."""
    if free_to_read(tokens):
        _check_ids("tokens", tokens, vocab_size)


def _check_ids(name: str, ids: Tensor, vocab_size: int, besides: str = "") -> None:
    if not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        known = f"the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}){besides}"
        raise ValueError(f"{name}: id {outside} is not in {known}")
