"""What the tasks of the MAD benchmark have in common."""

import abc
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from numpy import ndarray
from torch import Tensor

from helmholtz.experiments.recall.data import IGNORED

__all__ = ["IGNORED", "AbstractMadTask", "Examples", "examples"]


@dataclass(frozen=True, slots=True)
class Examples:
    """Sequences and what is asked at each of their places."""

    inputs: Int[Tensor, "n T"]
    targets: Int[Tensor, "n T"]
    """``IGNORED`` where nothing is asked; already shifted, so that ``targets[:, t]`` belongs to the output at ``t``."""

    def __len__(self) -> int:
        return len(self.inputs)


def examples(inputs: Integer[ndarray, "n T"], targets: Integer[ndarray, "n T"]) -> Examples:
    """Both as tensors of int64."""
    return Examples(*(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in (inputs, targets)))


class AbstractMadTask(abc.ABC):
    """Sizes of a task, and its law. Subclasses are frozen dataclasses."""

    vocab_size: int
    """Token ids, special ones and noise included."""
    seq_len: int

    @property
    @abc.abstractmethod
    def n_tokens(self) -> int:
        """Tokens of an input."""

    @abc.abstractmethod
    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        """``n`` independent sequences.

        Args:
            training: whether to draw what is trained on; what is tested may follow another law and asks for less.

        Raises: ValueError unless ``n`` is positive.
        """
