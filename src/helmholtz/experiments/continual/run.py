"""Continual learning: maps over shared inputs and labels, one after another, with and without a written memory.

The decoder is trained on each map in turn and forgets the ones before. A memory that keeps what was read does not, as
long as a key is still the same when it is looked up: keys of frozen n-grams are, features of the trained decoder are
not, and are the control.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check_choice, check_integer, check_positive
from helmholtz.experiments.recall.data import IGNORED, MapTask, epochs, sample_maps
from helmholtz.experiments.recall.run import CLIP_NORM
from helmholtz.layers.key_value_memory import KeyValueMemory, NGramKeys
from helmholtz.layers.slots import SlotPolicy
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.ops.losses import cross_entropy
from helmholtz.training.fit import FitCallback, fit

MemoryKeys = Literal["none", "ngram", "features"]
KEY_WIDTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinualConfig:
    """What is learned and how, and what the memory is."""

    task: MapTask = MapTask()
    steps: int = 150
    """Optimizer steps per map; no pair of an earlier map is seen again."""
    batch_size: int = 64
    lr: float = 3e-3
    keys: MemoryKeys = "ngram"
    """Keys of the memory: of the frozen 2-gram, or the decoder's last features as they are trained; or no memory."""
    n_slots: int = 500
    """Pairs the memory can hold; the maps have ``n_tasks n_inputs`` together."""
    policy: SlotPolicy = "fifo"
    beta: float = 8.0

    def __post_init__(self) -> None:
        check_choice("keys", self.keys, get_args(MemoryKeys))
        check_choice("policy", self.policy, get_args(SlotPolicy))
        for name in ("steps", "batch_size", "n_slots"):
            check_integer(name, getattr(self, name))
        for name in ("lr", "beta"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class ContinualResult:
    """Accuracies ``matrix[i][j]`` of map ``j`` after map ``i`` was learned, and what the memory did."""

    matrix: tuple[tuple[float, ...], ...]
    chance: float
    num_writes: int
    """Pairs that were stored, overwritten ones included."""
    memory_bytes: int
    answered: float | None
    """Fraction of all pairs that the memory answers at the end; None without one."""
    key_cosine: float | None
    """Mean cosine of the first map's keys as written with the same keys at the end; None without a memory."""

    @property
    def accuracy(self) -> float:
        """ACC: mean over maps after the last."""
        return _mean(self.matrix[-1])

    @property
    def backward_transfer(self) -> float:
        """BWT: how much better an earlier map is at the end than right after it was learned."""
        return _mean([self.matrix[-1][j] - self.matrix[j][j] for j in range(len(self.matrix) - 1)])

    @property
    def forgetting(self) -> float:
        """F: how far an earlier map has fallen at the end from its best time."""
        before = self.matrix[:-1]
        return _mean([max(row[j] for row in before) - self.matrix[-1][j] for j in range(len(before))])

    @property
    def forward_transfer(self) -> float:
        """FWT: accuracy above chance of a map that is learned next."""
        return _mean([self.matrix[j - 1][j] - self.chance for j in range(1, len(self.matrix))])

    @property
    def diagonal(self) -> float:
        """Mean accuracy of each map right after it was learned."""
        return _mean([self.matrix[j][j] for j in range(len(self.matrix))])

    def to_dict(self) -> dict[str, Any]:
        """For a result file, the measures included."""
        names = ("accuracy", "backward_transfer", "forgetting", "forward_transfer", "diagonal")
        return {**{name: getattr(self, name) for name in names}, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ContinualResult":
        """What ``to_dict`` gave, also as JSON brings it back."""
        own = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{**own, "matrix": tuple(tuple(row) for row in own["matrix"])})


def _mean(values: Sequence[float]) -> float:
    """0 of nothing: one map alone has nothing to forget."""
    return sum(values) / len(values) if values else 0.0


Progress = Callable[[int, int, float], object]
"""Called with the map, the step (both from 0) and the loss."""


@final
class ContinualLearning:
    """One decoder, trained on map after map, and the memory that is written beside it.

    A pair is written in the first pass over its map, after the step that trains on it; where the memory answers, its
    answer counts, elsewhere the decoder's.

    Args:
        seed: of the maps, of the order of the pairs and of the memory's frozen vectors. Initial weights are the
            caller's.

    Raises: ValueError if the maps have more tokens than the model's vocabulary.
    """

    def __init__(self, model: Decoder, config: ContinualConfig, *, seed: int = 0) -> None:
        self.model, self.config, task = model, config, config.task
        size = model.config.vocab_size
        if size < task.vocab_size:
            raise ValueError(f"task: {task.vocab_size} token ids, the model's vocabulary has {size}")
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens, self.labels = sample_maps(task, generator=self.generator)
        self.memory: KeyValueMemory | None = None
        if config.keys != "none":
            self.ngrams = NGramKeys(task.vocab_size, KEY_WIDTH, n=2, seed=seed)
            d_key = KEY_WIDTH if config.keys == "ngram" else model.config.d_model
            self.memory = KeyValueMemory(
                d_key, task.n_labels, config.n_slots, beta=config.beta, policy=config.policy, seed=seed
            )
        self.num_writes = 0
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)

    def run(self, progress: Progress | None = None) -> ContinualResult:
        """Learn all maps in turn, measuring every map after each."""
        matrix, written = [], None
        for number in range(self.config.task.n_tasks):
            self.learn(number, progress)
            if number == 0 and self.memory is not None:
                written = self.keys(self.tokens[0])
            matrix.append(tuple(self.measure(j) for j in range(self.config.task.n_tasks)))
        answered = cosine = None
        if self.memory is not None:
            assert written is not None
            answered = self.memory.read(self.keys(self.tokens.flatten(0, 1))).answered.double().mean().item()
            cosine = torch.cosine_similarity(written, self.keys(self.tokens[0]), dim=-1).mean().item()
        return ContinualResult(
            tuple(matrix),
            self.config.task.chance,
            self.num_writes,
            0 if self.memory is None else self.memory.num_bytes,
            answered,
            cosine,
        )

    def learn(self, number: int, progress: Progress | None = None) -> None:
        """Train on one map; its pairs are written as they are read for the first time."""
        c, tokens, labels = self.config, self.tokens[number], self.labels[number]
        batches = epochs(len(tokens), c.steps, c.batch_size, generator=self.generator)

        def write(step: int, loss: float) -> None:
            first = batches[step - 1][: max(0, len(tokens) - (step - 1) * c.batch_size)]
            if self.memory is not None and len(first):
                self.num_writes += self.memory.write(self.keys(tokens[first]), labels[first])
            if progress is not None:
                progress(number, step - 1, loss)

        self.fit(tokens, labels, batches, write)

    def fit(
        self,
        tokens: Int[Tensor, "n 2"],
        labels: Int[Tensor, "n"],
        batches: Sequence[Int[Tensor, "_"]],
        callback: FitCallback | None = None,
    ) -> None:
        """Train the decoder alone on batches of the pairs."""

        def loss(batch: Int[Tensor, "_"]) -> Float[Tensor, ""]:
            return cross_entropy(self.model(tokens[batch]).logits, answers(labels[batch]))

        fit(self.model, batches, loss, self._optimizer, clip_norm=CLIP_NORM, callback=callback)

    def measure(self, number: int) -> float:
        """Accuracy on all pairs of a map."""
        tokens = self.tokens[number]
        with evaluation_mode(self.model):
            found = self.model(tokens).logits[:, -1].argmax(-1)
        if self.memory is not None:
            reading = self.memory.read(self.keys(tokens))
            found = torch.where(reading.answered, reading.value, found)
        return (found == self.labels[number]).double().mean().item()

    def keys(self, tokens: Int[Tensor, "n 2"]) -> Float[Tensor, "n K"]:
        """The memory's keys of some sequences, as the decoder is now."""
        if self.config.keys == "ngram":
            return self.ngrams(tokens)[:, -1]
        return last_features(self.model, tokens)


def answers(labels: Int[Tensor, "n"]) -> Int[Tensor, "n 2"]:
    """Targets of ``[task, input]`` sequences: the label at the last position."""
    return torch.stack([torch.full_like(labels, IGNORED), labels], dim=1)


def last_features(model: Decoder, tokens: Int[Tensor, "n T"]) -> Float[Tensor, "n D"]:
    """What the output matrix reads at the last position."""
    found: list[Tensor] = []
    hook = model.unembed.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        with evaluation_mode(model):
            model(tokens)
    finally:
        hook.remove()
    return found[0][:, -1].float()


def joint_accuracy(model: Decoder, config: ContinualConfig, *, seed: int = 0) -> tuple[float, ...]:
    """Accuracy of every map after training on all of them at once, as many steps in total: what could be had."""
    learning = ContinualLearning(model, config, seed=seed)
    tokens, labels = learning.tokens.flatten(0, 1), learning.labels.flatten()
    steps = config.steps * config.task.n_tasks
    learning.fit(tokens, labels, epochs(len(tokens), steps, config.batch_size, generator=learning.generator))
    learning.memory = None
    return tuple(learning.measure(j) for j in range(config.task.n_tasks))
