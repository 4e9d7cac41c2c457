"""The simplest sequences that need a memory: a random word, over and over."""

import torch
from jaxtyping import Int
from torch import Tensor

from helmholtz._checks import check_integer


def sample_periodic(
    n_sequences: int, n_tokens: int, *, period: int, vocab_size: int, generator: torch.Generator
) -> Int[Tensor, "n T"]:
    """Sequences that repeat ``period`` independent uniform tokens; all but the first ``period`` are determined."""
    for name, value in (("n_sequences", n_sequences), ("n_tokens", n_tokens), ("period", period)):
        check_integer(name, value)
    check_integer("vocab_size", vocab_size)
    word = torch.randint(vocab_size, (n_sequences, period), generator=generator)
    return word[:, torch.arange(n_tokens) % period]
