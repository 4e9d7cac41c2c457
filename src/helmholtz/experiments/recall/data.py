"""Tasks whose answer has to be remembered: pairs in a context, and maps that are learned one after another."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from helmholtz._checks import check_integer

IGNORED = -100
"""Target of a token whose prediction is not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """Sequences ``k1 v1 ... kP vP q``, to be answered with the value of the key ``q``.

    Keys are the ids from 0 on, values the ids behind them; the keys of a sequence are all different, its values and
    the pair that is asked for are uniform.
    """

    n_pairs: int = 4
    n_keys: int = 16
    n_values: int = 16

    def __post_init__(self) -> None:
        check_integer("n_pairs", self.n_pairs)
        check_integer("n_keys", self.n_keys, minimum=self.n_pairs)
        check_integer("n_values", self.n_values)

    @property
    def vocab_size(self) -> int:
        return self.n_keys + self.n_values

    @property
    def n_tokens(self) -> int:
        return 2 * self.n_pairs + 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / self.n_values


def sample_pairs(
    task: PairTask, n_sequences: int, *, generator: torch.Generator
) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"]]:
    """``(tokens, targets)``; targets are ``IGNORED`` but at the last position, where the value is asked for."""
    check_integer("n_sequences", n_sequences)
    order = torch.rand(n_sequences, task.n_keys, generator=generator).argsort(1)
    keys = order[:, : task.n_pairs]
    values = task.n_keys + torch.randint(task.n_values, keys.shape, generator=generator)
    asked = torch.randint(task.n_pairs, (n_sequences, 1), generator=generator)
    tokens = torch.cat([torch.stack([keys, values], dim=2).flatten(1), keys.gather(1, asked)], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = values.gather(1, asked)
    return tokens, targets


@dataclass(frozen=True, slots=True, kw_only=True)
class MapTask:
    """Random maps from inputs to labels, one per task, over the *same* inputs and labels: each overwrites the last.

    A sequence is ``[task, input]``, to be answered with the label. Labels are the ids from 0 on, then come the inputs,
    then the tasks.
    """

    n_tasks: int = 5
    n_inputs: int = 100
    n_labels: int = 10

    def __post_init__(self) -> None:
        check_integer("n_tasks", self.n_tasks)
        check_integer("n_inputs", self.n_inputs)
        check_integer("n_labels", self.n_labels, minimum=2)

    @property
    def vocab_size(self) -> int:
        return self.n_labels + self.n_inputs + self.n_tasks

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the labels."""
        return 1 / self.n_labels


def sample_maps(
    task: MapTask, *, generator: torch.Generator
) -> tuple[Int[Tensor, "tasks inputs 2"], Int[Tensor, "tasks inputs"]]:
    """All sequences ``[task, input]`` of every task, and their labels."""
    labels = torch.randint(task.n_labels, (task.n_tasks, task.n_inputs), generator=generator)
    inputs = task.n_labels + torch.arange(task.n_inputs).expand_as(labels)
    tasks = task.n_labels + task.n_inputs + torch.arange(task.n_tasks).unsqueeze(1).expand_as(labels)
    return torch.stack([tasks, inputs], dim=2), labels


def epochs(
    n_items: int, n_steps: int, batch_size: int, *, generator: torch.Generator
) -> list[Int[Tensor, "_"]]:
    """The items of ``n_steps`` batches: every item once, in random order, before any of them comes again.

    Raises: ValueError unless all sizes are positive.
    """
    for name, value in (("n_items", n_items), ("n_steps", n_steps), ("batch_size", batch_size)):
        check_integer(name, value)
    n_epochs = -(-n_steps * batch_size // n_items)
    order = torch.cat([torch.randperm(n_items, generator=generator) for _ in range(n_epochs)])
    return list(order[: n_steps * batch_size].split(batch_size))
