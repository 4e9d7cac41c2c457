"""The order in which training text is read, as a function of the seed and the position."""

import functools

import torch
from jaxtyping import Int
from torch import Tensor


@functools.lru_cache(maxsize=4)
def _epoch(n_windows: int, slack: int, seed: int, epoch: int) -> tuple[int, Int[Tensor, " n"]]:
    # torch keeps 32 bits of a seed: an odd multiplier spreads seeds apart, epochs count on from there
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) % 2**32)
    offset = int(torch.randint(slack, (), generator=generator))
    return offset, torch.randperm(n_windows, generator=generator)


def window_starts(first: int, count: int, *, n_tokens: int, seq_len: int, seed: int) -> Int[Tensor, " count"]:
    """Starts of windows ``first .. first + count - 1`` of the endless training stream.

    Each epoch cuts the text into windows of ``seq_len`` (plus the token to predict after the last one) from a
    random offset, and reads all of them once in random order. The result depends on the arguments alone, so the
    position ``first`` is all that has to be saved to resume exactly, and two models of one seed see the same data.

    Raises: ValueError if the text is too short for one window.
    """
    n_windows = n_tokens // seq_len - 1
    if n_windows < 1:
        raise ValueError(
            f"the training text has {n_tokens} tokens; train.seq_len = {seq_len} needs at least {2 * seq_len}"
        )
    starts = []
    for index in range(first, first + count):
        epoch, row = divmod(index, n_windows)
        offset, order = _epoch(n_windows, seq_len, seed, epoch)
        starts.append(offset + seq_len * int(order[row]))
    return torch.tensor(starts)
