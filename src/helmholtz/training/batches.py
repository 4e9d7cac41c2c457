"""What steps and evaluations read: rows of tokens, each with the key of what is random about it."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float64, Int
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


AHEAD = 2
"""Micro-batches that a GPU's reader has ready."""


class ReadAhead:
    """Calls ``read`` in a thread of its own for what will be asked for next.

    A batch is a function of its place, so a guess that does not come true costs a read and changes nothing. The work is
    a copy from a memory-mapped file: the worker processes of a ``DataLoader`` would cost more than they take over, and
    would read in an order that a resumed run had to be told.

    Args:
        stride: from one call's place to the next one's.
    """

    def __init__(self, read: Callable[[int], Batch], stride: int) -> None:
        self._read, self._stride = read, stride
        self._pool = ThreadPoolExecutor(1, "read ahead")
        self._futures: dict[int, Future[Batch]] = {}

    def __call__(self, first: int) -> Batch:
        places = range(first, first + (AHEAD + 1) * self._stride, self._stride)
        known = self._futures
        self._futures = {
            place: known[place] if place in known else self._pool.submit(self._read, place)
            for place in places
        }
        return self._futures.pop(first).result()


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
        self._read: Callable[[int], Batch] = self._rows
        if device.type == "cuda":
            self.read_ahead()
        targets = validation.read(torch.tensor([1]), self.n_validation_tokens)
        self.validation_bytes = validation.count_bytes(targets)

    @property
    def n_validation_tokens(self) -> int:
        """Tokens that an evaluation predicts."""
        return self.n_validation_windows * self.config.seq_len

    def read_ahead(self) -> None:
        """From now on micro-batches are read by a thread, before they are asked for."""
        self._read = ReadAhead(self._rows, self.config.batch_size)

    def bytes_per_target(self, tokens: Int[Tensor, "B T1"]) -> Float64[Tensor, ""]:
        """Mean bytes of text that the tokens which rows of training text predict stand for."""
        return self._byte_counts[tokens[:, 1:]].mean()

    def _starts(self, first: int, count: int) -> Int[Tensor, " count"]:
        c = self.config
        return window_starts(first, count, n_tokens=len(self.train), seq_len=c.seq_len, seed=c.seed)

    def micro_batch(self, windows: int, index: int) -> Batch:
        """This process's rows of micro-batch ``index`` of the step that comes after so many ``windows``."""
        return self._on_device(self._read(windows + index * self.config.batch_size))

    def _rows(self, first: int) -> Batch:
        """This process's rows of the micro-batch that begins at window ``first``; on the CPU, pinned for a GPU."""
        c, first = self.config, first + world().rank * self.rows
        keys = row_keys(c.seed, torch.arange(first, first + self.rows))
        return self._pinned(self.train.read(self._starts(first, self.rows), c.seq_len + 1), keys)

    def _pinned(self, tokens: Tensor, keys: Tensor) -> Batch:
        return (tokens.pin_memory(), keys.pin_memory()) if self.device.type == "cuda" else (tokens, keys)

    def _on_device(self, batch: Batch) -> Batch:
        tokens, keys = batch
        return tokens.to(self.device, non_blocking=True), keys.to(self.device, non_blocking=True)

    def of_step(self, windows: int) -> Iterator[Batch]:
        """This process's micro-batches of the step that comes after so many ``windows``."""
        for index in range(self.config.accumulation):
            yield self.micro_batch(windows, index)

    def of_validation(self) -> Iterator[Batch]:
        """All batches, on every process: evaluations are small, and so their numbers do not depend on the processes."""
        c = self.config
        for rows in torch.arange(self.n_validation_windows).split(c.batch_size):
            keys = row_keys(c.seed + VALIDATION_SEED, rows)
            yield self._on_device(self._pinned(self.validation.read(rows * c.seq_len, c.seq_len + 1), keys))
