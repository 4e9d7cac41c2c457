"""What steps and evaluations read: rows of tokens, each with the key of what is random about it."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from helmholtz.data.tokens import TokenDataset
from helmholtz.ops.row_random import row_keys
from helmholtz.training.config import TrainConfig
from helmholtz.training.distributed import local_share, world
from helmholtz.training.order import window_starts

Batch = tuple[Int[Tensor, "B T1"], Int[Tensor, "B"]]
"""Rows of ``seq_len + 1`` tokens and their keys."""
VALIDATION_SEED = 2**31
"""Added to the seed for what is drawn in evaluations."""


class Batches:
    """The batches of a run as functions of its seed and the position in the training stream.

    Raises: ValueError if a split holds no window, or the processes cannot share a batch.
    """

    def __init__(
        self, train: TokenDataset, validation: TokenDataset, config: TrainConfig, device: torch.device
    ) -> None:
        self.train, self.validation, self.config, self.device = train, validation, config, device
        self.rows = local_share(config.batch_size, "train.batch_size")
        self.n_validation_windows = min(config.eval_tokens, len(validation) - 1) // config.seq_len
        if self.n_validation_windows < 1:
            raise ValueError(
                f"the first {config.eval_tokens} (train.eval_tokens) of the {len(validation)} validation tokens do "
                f"not hold a window of train.seq_len = {config.seq_len}"
            )
        self._starts(0, 1)  # is there a window?
        self._byte_counts = train.byte_counts.to(device, torch.float64)
        targets = validation.read(torch.tensor([1]), self.n_validation_tokens)
        self.validation_bytes = validation.count_bytes(targets)

    @property
    def n_validation_tokens(self) -> int:
        """Tokens that an evaluation predicts."""
        return self.n_validation_windows * self.config.seq_len

    def bytes_per_target(self, tokens: Int[Tensor, "B T1"]) -> float:
        """Mean bytes of text that the tokens which rows of training text predict stand for."""
        return self._byte_counts[tokens[:, 1:]].mean().item()

    def _starts(self, first: int, count: int) -> Int[Tensor, " count"]:
        c = self.config
        return window_starts(first, count, n_tokens=len(self.train), seq_len=c.seq_len, seed=c.seed)

    def micro_batch(self, windows: int, index: int) -> Batch:
        """This process's rows of micro-batch ``index`` of the step that comes after so many ``windows``."""
        c = self.config
        first = windows + index * c.batch_size + world().rank * self.rows
        starts = self._starts(first, self.rows)
        keys = row_keys(c.seed, torch.arange(first, first + self.rows))
        return self.train.read(starts, c.seq_len + 1).to(self.device), keys.to(self.device)

    def of_step(self, windows: int) -> Iterator[Batch]:
        """This process's micro-batches of the step that comes after so many ``windows``."""
        for index in range(self.config.accumulation):
            yield self.micro_batch(windows, index)

    def of_validation(self) -> Iterator[Batch]:
        """All batches, on every process: evaluations are small, and so their numbers do not depend on the processes."""
        c = self.config
        for rows in torch.arange(self.n_validation_windows).split(c.batch_size):
            keys = row_keys(c.seed + VALIDATION_SEED, rows).to(self.device)
            yield self.validation.read(rows * c.seq_len, c.seq_len + 1).to(self.device), keys
