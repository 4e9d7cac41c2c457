"""The data distribution of the Free Transformer's paper: a run of one letter somewhere on a line, under noise.

A sequence is a prompt, a letter and ``>``, and then a line of underscores in which that letter stands ``run_length``
times in a row, from a uniform start; each character of the line is replaced by ``!`` with probability ``noise``:

    K>_________!_______KKKKKK!K_____!__________________!_____________

What a plan can hold is thereby known exactly: where the run starts, and which characters are noise.

Source: Fleuret, "The Free Transformer", 2025, section 4.1.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer

N_LETTERS = 26
BLANK, NOISE, MARK = 26, 27, 28
ALPHABET = string.ascii_uppercase + "_!>"
PROMPT_LENGTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterLaw:
    """Sizes of the distribution; the defaults are the paper's."""

    n_characters: int = 64
    """Length of the line after the prompt."""
    run_length: int = 8
    noise: float = 1 / 16
    """Probability that a character of the line is replaced."""

    def __post_init__(self) -> None:
        check_integer("run_length", self.run_length)
        check_integer("n_characters", self.n_characters, minimum=self.run_length)
        check(0 <= self.noise < 1, "noise", self.noise, "in [0, 1)")

    @property
    def n_starts(self) -> int:
        """Places where the run may start."""
        return self.n_characters - self.run_length + 1

    @property
    def n_tokens(self) -> int:
        """Tokens of a sequence, prompt included."""
        return PROMPT_LENGTH + self.n_characters

    @property
    def n_targets(self) -> int:
        """Tokens that are predicted: all but the first."""
        return self.n_tokens - 1

    def windows(self) -> Bool[Tensor, "starts characters"]:
        """Which characters a run covers, for each of its starts."""
        offset = torch.arange(self.n_characters) - torch.arange(self.n_starts).unsqueeze(1)
        return (offset >= 0) & (offset < self.run_length)


def sample_letters(law: LetterLaw, n_sequences: int, *, generator: torch.Generator) -> Int[Tensor, "n T"]:
    """Independent sequences of the distribution."""
    check_integer("n_sequences", n_sequences)
    letter = torch.randint(N_LETTERS, (n_sequences, 1), generator=generator)
    start = torch.randint(law.n_starts, (n_sequences,), generator=generator)
    line = torch.where(law.windows()[start], letter, BLANK)
    noisy = torch.rand(line.shape, generator=generator) < law.noise
    return torch.cat([letter, torch.full_like(letter, MARK), line.masked_fill(noisy, NOISE)], dim=1)


def letters_to_text(tokens: Sequence[int]) -> str:
    """The characters of token ids. Raises: ValueError for an id outside the alphabet."""
    for token in tokens:
        check(0 <= token < len(ALPHABET), "tokens", token, f"in [0, {len(ALPHABET)})")
    return "".join(ALPHABET[token] for token in tokens)


def possible_starts(law: LetterLaw, tokens: Int[Tensor, "n T"]) -> Bool[Tensor, "n starts"]:
    """The starts of the run under which each sequence has a probability above zero.

    All of them are then equally likely, for the noise does not depend on what it replaces. A sequence without any is
    not one of the distribution.

    Raises: ValueError if the sequences are not of the distribution's length.
    """
    check(tokens.shape[1] == law.n_tokens, "tokens", tuple(tokens.shape), f"of {law.n_tokens} tokens each")
    letter, line = tokens[:, :1], tokens[:, PROMPT_LENGTH:]
    prompted = ((letter < N_LETTERS) & (tokens[:, 1:PROMPT_LENGTH] == MARK)).squeeze(1)
    noise = line == NOISE
    inside, outside = noise | (line == letter), noise | (line == BLANK)
    windows = law.windows().double()
    wrong = (~inside).double() @ windows.T + (~outside).double() @ (1 - windows).T
    return (wrong == 0) & prompted.unsqueeze(1)


def run_starts(law: LetterLaw, tokens: Int[Tensor, "n T"]) -> Float[Tensor, " n"]:
    """The mean of each sequence's possible starts; NaN where it is not one of the distribution."""
    possible = possible_starts(law, tokens).double()
    return (possible @ torch.arange(law.n_starts).double()) / possible.sum(1)


def log_likelihood(law: LetterLaw, tokens: Int[Tensor, "n T"]) -> Float[Tensor, " n"]:
    """Log-probability in nats of each sequence given its letter; minus infinity if the distribution has none such."""
    possible = possible_starts(law, tokens).sum(1).double()
    noise = (tokens[:, PROMPT_LENGTH:] == NOISE).sum(1).double()
    kept = law.n_characters - noise
    return torch.xlogy(noise, law.noise) + torch.xlogy(kept, 1 - law.noise) + (possible / law.n_starts).log()


def noise_floor(law: LetterLaw) -> float:
    r"""Entropy of the noise in nats per predicted token, :math:`n H(\epsilon) / (n + 1)`: what is left to pay by who
    knows the start of the run."""
    return law.n_characters * _binary_entropy(law.noise) / law.n_targets


def vanilla_floor(law: LetterLaw) -> float:
    r"""Entropy of a sequence given its letter, in nats per predicted token: the best cross-entropy without a plan.

    .. math:: \frac{n H(\epsilon) + \ln M - \mathrm{E} \ln c(x)}{n + 1}

    with ``M`` starts, of which :math:`c(x)` are possible once the line is seen. Exact.
    """
    unknown = math.log(law.n_starts) - _visible_ambiguity(law) - _hidden_ambiguity(law)
    return noise_floor(law) + unknown / law.n_targets


def _binary_entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _visible_ambiguity(law: LetterLaw) -> float:
    """E ln c over lines in which some of the run is seen.

    The run may as well start ``a`` later if its first ``a`` characters and the ``a`` behind it are noise, and ``b``
    earlier likewise; ``c = 1 + a + b`` for the largest such numbers.
    """
    q, r, total = law.noise, law.run_length, 0.0

    def at_least(a: int, b: int, start: int) -> float:
        if a + b >= r or a > law.n_starts - 1 - start or b > start:
            return 0.0
        return q ** (a + b) * (q ** (a + b) - q**r)

    for start in range(law.n_starts):
        for a in range(r):
            for b in range(r - a):
                exactly = at_least(a, b, start) - at_least(a + 1, b, start)
                exactly -= at_least(a, b + 1, start) - at_least(a + 1, b + 1, start)
                total += exactly * math.log(1 + a + b)
    return total / law.n_starts


def _hidden_ambiguity(law: LetterLaw) -> float:
    """E ln c over lines in which the whole run is noise: ``c`` counts the windows that are noise, and
    ``P(x) = c(x) / M`` times the probability of the noise, so this is ``E [c ln c] / M`` over independent noise."""
    q, r = law.noise, law.run_length
    # by noise in a row, counted up to r, and by windows so far
    chance = torch.zeros(r + 1, law.n_starts + 1, dtype=torch.float64)
    chance[0, 0] = 1
    for _ in range(law.n_characters):
        after = torch.zeros_like(chance)
        after[0] = (1 - q) * chance.sum(0)
        after[1:] = q * chance[:-1]
        after[r] += q * chance[r]
        after[r] = after[r].roll(1)  # a window is complete; the last count is never reached before the end
        chance = after
    return sum(p * c * math.log(c) for c, p in enumerate(chance.sum(0).tolist()) if c) / law.n_starts
