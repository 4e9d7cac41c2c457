"""Pairs in a context and a key that asks for its value: by a decoder that learns it, by a memory that is written."""

from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check_integer, check_positive
from helmholtz.experiments.recall.data import PairTask, sample_pairs
from helmholtz.layers.key_value_memory import KeyValueMemory, NGramKeys
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.ops.losses import cross_entropy
from helmholtz.training.fit import FitCallback, fit

BATCH_SIZE = 64
CLIP_NORM = 1.0
EVALUATION_SEED = 1_000_003
"""Added to the seed: a model is measured on other sequences than it was trained on."""


@dataclass(frozen=True, slots=True)
class InContextResult:
    """Accuracy at the one position that is asked for."""

    accuracy: float
    chance: float
    """Of a guess among the values: what an untrained model can hope for."""
    n_sequences: int
    steps: int
    """Training steps so far; 0 is an untrained model."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@final
class InContextRecall:
    """The pair task for one decoder, which keeps its optimizer between calls of ``train``.

    Raises: ValueError if the task has more tokens than the model's vocabulary.
    """

    def __init__(self, model: Decoder, task: PairTask, *, lr: float = 3e-3, seed: int = 0) -> None:
        check_positive("lr", lr)
        size = model.config.vocab_size
        if size < task.vocab_size:
            raise ValueError(f"task: {task.vocab_size} token ids, the model's vocabulary has {size}")
        self.model, self.task, self.seed, self.steps = model, task, seed, 0
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        self._generator = torch.Generator().manual_seed(seed)

    def train(self, steps: int, *, callback: FitCallback | None = None) -> None:
        """``steps`` batches; the number of pairs rises to the task's over the first half of them.

        Only the value is asked for. The callback gets the step, from 1, and its loss.
        """
        check_integer("steps", steps)
        was_training = self.model.training

        def loss(step: int) -> Float[Tensor, ""]:
            task = replace(
                self.task, n_pairs=min(self.task.n_pairs, 1 + 2 * step * self.task.n_pairs // steps)
            )
            tokens, targets = sample_pairs(task, BATCH_SIZE, generator=self._generator)
            return cross_entropy(self.model(tokens).logits, targets)

        fit(self.model, range(1, steps + 1), loss, self._optimizer, clip_norm=CLIP_NORM, callback=callback)
        self.steps += steps
        self.model.train(was_training)

    def evaluate(self, n_sequences: int = 2048) -> InContextResult:
        """Accuracy over the whole vocabulary, on sequences that training does not draw."""
        check_integer("n_sequences", n_sequences)
        generator = torch.Generator().manual_seed(EVALUATION_SEED + self.seed)
        tokens, targets = sample_pairs(self.task, n_sequences, generator=generator)
        hits = 0
        with evaluation_mode(self.model):
            for some, wanted in zip(tokens.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True):
                hits += int((self.model(some).logits[:, -1].argmax(-1) == wanted[:, -1]).sum())
        return InContextResult(hits / n_sequences, self.task.chance, n_sequences, self.steps)


def recall_by_memory(task: PairTask, n_sequences: int, *, d_key: int = 64, seed: int = 0) -> InContextResult:
    """The pair task without a model and without training: each pair is written as it is read, the last key is read.

    Every sequence has an empty memory of its own, with a slot per pair.
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    tokens, targets = sample_pairs(task, n_sequences, generator=generator)
    keys = NGramKeys(task.vocab_size, d_key, n=1, seed=seed)(tokens)
    memory = KeyValueMemory(d_key, task.n_values, task.n_pairs, seed=seed)
    hits = 0
    for row, vectors, wanted in zip(tokens, keys, targets[:, -1].tolist(), strict=True):
        memory.store.clear()
        memory.write(vectors[0:-1:2], row[1::2] - task.n_keys)
        reading = memory.read(vectors[-1:])
        hits += bool(reading.answered) and int(reading.value) + task.n_keys == wanted
    return InContextResult(hits / n_sequences, task.chance, n_sequences, 0)
