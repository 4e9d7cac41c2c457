"""Recall of pairs in a context: as they were, between noise, and with keys and values of several tokens.

Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024 (MAD), section 3 and its public code
with ``multi_query``. The laws are the published ones; the bytes are not, for the numbers are drawn in another order.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Integer
from numpy import ndarray

from helmholtz._checks import check, check_fraction, check_integer
from helmholtz.experiments.mad.data.base import IGNORED, AbstractMadTask, Examples, examples

BLOCK = 256
"""Sequences of fuzzy recall whose random numbers are drawn at once."""


def _check_pairs(seq_len: int, n_symbols: int) -> None:
    check_integer("seq_len", seq_len, minimum=4)
    check(seq_len % 2 == 0, "seq_len", seq_len, "even, as it is filled with pairs")
    check(n_symbols >= 2, "vocab_size", n_symbols, "at least 2 beside the noise: a key and a value")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InContextRecall(AbstractMadTask):
    """``k1 v1 k2 v2 ...``: keys uniform with replacement, each with one value in a sequence; the last pair was seen.

    The lower half of the ids are keys, the upper half values. Of ``seq_len`` tokens all but the last are the input.
    In training every next token is asked for, also the keys, which nobody can know; in the test the values of keys that
    have been seen before.
    """

    vocab_size: int = 16
    seq_len: int = 128

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size)
        _check_pairs(self.seq_len, self.vocab_size)

    @property
    def n_tokens(self) -> int:
        return self.seq_len - 1

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        quiet = np.zeros((n, self.seq_len // 2 - 1), dtype=bool)
        return _recall(self.vocab_size, quiet, None, training=training, generator=generator)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyInContextRecall(AbstractMadTask):
    """``InContextRecall`` in which each pair but the last becomes two tokens of noise with probability ``frac_noise``.

    The noise has the last ``n_noise_ids`` ids. One place, uniform among all pairs, is never noise; where it is that of
    the last pair and all else is noise, the published code fails, and the first pair is kept here.
    """

    vocab_size: int = 32
    seq_len: int = 128
    n_noise_ids: int = 16
    frac_noise: float = 0.2

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size)
        check_integer("n_noise_ids", self.n_noise_ids)
        check_fraction("frac_noise", self.frac_noise)
        _check_pairs(self.seq_len, self.vocab_size - self.n_noise_ids)

    @property
    def n_tokens(self) -> int:
        return self.seq_len - 1

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        slots = self.seq_len // 2 - 1
        noisy = generator.random((n, slots)) < self.frac_noise
        kept = generator.integers(slots + 1, size=n)
        noisy &= np.arange(slots) != kept[:, None]
        noisy[noisy.all(1), 0] = False
        n_symbols = self.vocab_size - self.n_noise_ids
        noise = n_symbols + generator.integers(self.n_noise_ids, size=(n, slots, 2))
        return _recall(n_symbols, noisy, noise, training=training, generator=generator)


def _recall(
    n_symbols: int,
    noisy: Bool[ndarray, "n slots"],
    noise: Integer[ndarray, "n slots 2"] | None,
    *,
    training: bool,
    generator: np.random.Generator,
) -> Examples:
    """Pairs in the slots that are not noisy, and a last pair that asks for one of them."""
    n, slots = noisy.shape
    n_keys = n_symbols // 2
    keys = generator.integers(n_keys, size=(n, slots))
    value_of = n_keys + generator.integers(n_symbols - n_keys, size=(n, n_keys))
    first = _first_slots(keys, noisy, n_keys)
    draw = np.where(first < slots, generator.random((n, n_keys)), -1.0)
    keys = np.concatenate([keys, draw.argmax(1)[:, None]], axis=1)  # the last: uniform among the keys seen
    values = np.take_along_axis(value_of, keys, 1)
    known = np.take_along_axis(first, keys, 1) < np.arange(slots + 1)
    tokens = np.stack([keys, values], axis=2)
    asked = np.stack([np.full_like(keys, IGNORED), np.where(known, values, IGNORED)], axis=2)
    if noise is not None:
        tokens[:, :-1][noisy] = noise[noisy]
        asked[:, :-1][noisy] = IGNORED
    tokens, asked = tokens.reshape(n, -1), asked.reshape(n, -1)
    return examples(tokens[:, :-1], tokens[:, 1:] if training else asked[:, 1:])


def _first_slots(
    keys: Integer[ndarray, "n slots"], noisy: Bool[ndarray, "n slots"], n_keys: int
) -> Integer[ndarray, "n keys"]:
    """Slot in which each key is first seen, ``slots`` if it is not."""
    n, slots = keys.shape
    first = np.full((n, n_keys), slots)
    for slot in reversed(range(slots)):
        rows = np.flatnonzero(~noisy[:, slot])
        first[rows, keys[rows, slot]] = slot
    return first


Motif = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzyInContextRecall(AbstractMadTask):
    """Recall of pairs whose keys and values are motifs: 1 to ``k_motif`` and 1 to ``v_motif`` different tokens.

    Of ``vocab_size`` ids the last is the pad, the lower half of the others are tokens of keys, the upper half of
    values. Sizes are uniform, motifs of a size too; in the test every key has the full size. A pair is chosen to be
    asked for at the end. It is put at the first place at or behind a uniform one, unless chance has brought its key
    before; the uniform place may lie behind all others, so that a few of the last pairs (about 2.5 % in the test at the
    default sizes) cannot be answered. Pads on the left fill up to ``seq_len + 1`` tokens; all but the last are the
    input.

    In training every next token is asked for, pads included; in the test the values of keys that have been seen.
    """

    vocab_size: int = 16
    seq_len: int = 128
    k_motif: int = 3
    v_motif: int = 3

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "k_motif", "v_motif"):
            check_integer(name, getattr(self, name))
        wanted = f"an integer with {self.k_motif} ids for keys and {self.v_motif} for values"
        check(self.n_key_ids >= self.k_motif, "vocab_size", self.vocab_size, wanted)
        check(self.n_value_ids >= self.v_motif, "vocab_size", self.vocab_size, wanted)
        longest = self.k_motif + self.v_motif
        check(
            self.seq_len > 2 * longest,
            "seq_len",
            self.seq_len,
            f"above twice the longest pair, {2 * longest}",
        )

    @property
    def n_key_ids(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def n_value_ids(self) -> int:
        return self.vocab_size - 1 - self.n_key_ids

    @property
    def pad(self) -> int:
        return self.vocab_size - 1

    @property
    def n_tokens(self) -> int:
        return self.seq_len

    def sample(self, n: int, *, training: bool, generator: np.random.Generator) -> Examples:
        check_integer("n", n)
        tokens = np.full((n, self.seq_len + 1), self.pad)
        asked = np.full((n, self.seq_len + 1), IGNORED)
        for begin in range(0, n, BLOCK):
            rows = range(begin, min(begin + BLOCK, n))
            keys, values = self._motifs(len(rows), training=training, generator=generator)
            places = generator.random(len(rows)).tolist()
            for row, *drawn in zip(rows, keys, values, places, strict=True):
                line, wanted = self._sequence(*drawn)
                tokens[row, -len(line) :] = line
                asked[row, -len(line) :] = wanted
        return examples(tokens[:, :-1], tokens[:, 1:] if training else asked[:, 1:])

    def _motifs(
        self, n: int, *, training: bool, generator: np.random.Generator
    ) -> tuple[list[list[Motif]], list[list[Motif]]]:
        """Keys and values: the one that is asked for, then as many as the shortest pairs could need."""
        count = 1 + self.seq_len // 2
        smallest = 1 if training else self.k_motif
        found = []
        for first, n_ids, low, high in (
            (0, self.n_key_ids, smallest, self.k_motif),
            (self.n_key_ids, self.n_value_ids, 1, self.v_motif),
        ):
            sizes = generator.integers(low, high + 1, size=(n, count)).tolist()
            drawn = first + _arrangements(n * count, n_ids, high, generator).reshape(n, count, high)
            # a part of a uniform arrangement is a uniform arrangement
            found.append(
                [
                    [tuple(ids[:size]) for ids, size in zip(row, row_sizes, strict=True)]
                    for row, row_sizes in zip(drawn.tolist(), sizes, strict=True)
                ]
            )
        return found[0], found[1]

    def _sequence(self, keys: list[Motif], values: list[Motif], place: float) -> tuple[list[int], list[int]]:
        """Tokens without pads, and what the test asks for; ``place`` in [0, 1) is where the asked pair goes."""
        probe, answer = keys[0], values[0]
        length = len(probe) + len(answer)
        due = int(place * (self.seq_len - 2 * length))
        value_of, seen = {probe: answer}, set[Motif]()
        tokens, asked = list[int](), list[int]()
        fresh = zip(keys[1:], values[1:], strict=True)
        while len(tokens) < self.seq_len - length - self.k_motif - self.v_motif:
            key, drawn = next(fresh) if len(tokens) < due or probe in seen else (probe, answer)
            value = value_of.setdefault(key, drawn)
            tokens += key + value
            asked += (IGNORED,) * len(key) + (value if key in seen else (IGNORED,) * len(value))
            seen.add(key)
        return [*tokens, *probe, *answer], [*asked, *(IGNORED,) * len(probe), *answer]


def _arrangements(
    n: int, n_ids: int, size: int, generator: np.random.Generator
) -> Integer[ndarray, "n size"]:
    """Uniform ordered choices of ``size`` different ids out of ``n_ids``."""
    found = np.empty((n, 0), dtype=np.int64)
    for taken in range(size):
        drawn = generator.integers(n_ids - taken, size=n)
        for earlier in np.sort(found, axis=1).T:  # ascending: skip each id that is taken
            drawn += drawn >= earlier
        found = np.concatenate([found, drawn[:, None]], axis=1)
    return found
