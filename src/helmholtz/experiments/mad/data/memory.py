"""Facts that stay the same, a sequence in one vector, and tokens between blanks.

Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024 (MAD), section 3; its public code.
The laws are the published ones; the bytes are not, but for the facts of ``Memorization``.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from helmholtz._checks import check, check_integer
from helmholtz.experiments.mad.data.base import IGNORED, AbstractMadTask, Examples, examples

MAP_SEED = 12345
"""Of the facts to be memorized: as published, the same in every data set."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Memorization(AbstractMadTask):
    """``k1 ? k2 ? ...``: each key is followed by the last id, in whose place its value is asked for.

    The map from keys to values is the same in all sequences and in training and test. Keys are the lower half of the
    other ids, values the upper half, one to one; of an odd number of them one value is left over.
    """

    vocab_size: int = 256
    seq_len: int = 32

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, minimum=3)
        check_integer("seq_len", self.seq_len, minimum=2)
        check(self.seq_len % 2 == 0, "seq_len", self.seq_len, "even, as it is filled with pairs")

    @property
    def n_tokens(self) -> int:
        return self.seq_len

    @property
    def n_facts(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def insert(self) -> int:
        """The id that asks for a value."""
        return self.vocab_size - 1

    def facts(self) -> Integer[ndarray, "facts 2"]:
        """Keys and their values, byte for byte the published map: lists of both, shuffled by one generator."""
        generator = np.random.default_rng(MAP_SEED)
        keys, values = list(range(self.n_facts)), list(range(self.n_facts, self.vocab_size - 1))
        generator.shuffle(keys)
        generator.shuffle(values)
        return np.array(list(zip(keys, values, strict=False)))

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        drawn = self.facts()[generator.integers(self.n_facts, size=(n, self.seq_len // 2))]
        inputs, targets = drawn.copy(), drawn
        inputs[:, :, 1], targets[:, :, 0] = self.insert, IGNORED
        return examples(inputs.reshape(n, -1), targets.reshape(n, -1))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Compression(AbstractMadTask):
    """Uniform tokens and a last one that says the sequence is over; all of it is to be read from one vector."""

    vocab_size: int = 16
    seq_len: int = 32

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, minimum=2)
        check_integer("seq_len", self.seq_len, minimum=2)

    @property
    def n_tokens(self) -> int:
        return self.seq_len

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        tokens = generator.integers(self.vocab_size - 1, size=(n, self.seq_len))
        tokens[:, -1] = self.vocab_size - 1
        return examples(tokens, tokens)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveCopying(AbstractMadTask):
    """Uniform tokens between blanks, a mark, and as many blanks, in whose places the tokens are asked for in order.

    Each blank stands before a token, uniform which: the last token is always next to the mark. The mark is the last id,
    the blank the one before it.
    """

    vocab_size: int = 16
    seq_len: int = 256
    n_copied: int = 16

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, minimum=3)
        check_integer("n_copied", self.n_copied)
        check_integer("seq_len", self.seq_len, minimum=2 * self.n_copied + 2)

    @property
    def n_tokens(self) -> int:
        return self.seq_len

    @property
    def blank(self) -> int:
        return self.vocab_size - 2

    @property
    def mark(self) -> int:
        return self.vocab_size - 1

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        copied, rows = self.n_copied, np.arange(n)[:, None]
        content = generator.integers(self.vocab_size - 2, size=(n, copied))
        before = generator.integers(copied, size=(n, self.seq_len - 2 * copied - 1))
        blanks = np.zeros((n, copied), dtype=np.int64)
        np.add.at(blanks, (rows, before), 1)
        inputs = np.full((n, self.seq_len), self.blank)
        inputs[rows, np.arange(copied) + blanks.cumsum(1)] = content
        inputs[:, -copied - 1] = self.mark
        targets = np.full((n, self.seq_len), IGNORED)
        targets[:, -copied:] = content
        return examples(inputs, targets)
