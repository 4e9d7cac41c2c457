"""The codes of a text that is sampled: who plans the prompt, which codes are given, which bits are held."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.layers.latent import Plan
from helmholtz.models.sampling import SamplingSettings
from helmholtz.ops.binary_latent import bits_to_code, sample_bits

NOT_GIVEN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """Where the codes of a prompt and of its continuation come from.

    Raises: ValueError naming the field that is out of range.
    """

    prompt: Literal["posterior", "prior"] = "posterior"
    """Who plans the prompt: the encoder, which reads all of it, or the prior."""
    codes: tuple[tuple[int, ...], ...] | None = None
    """Given codes, a row of them per prompt, from its first token on; -1 or past the end: not given."""
    held_bits: tuple[tuple[int, int], ...] = ()
    """Pairs (bit, 0 or 1): values forced in every code that is not given."""
    seed: int | None = None
    """Seed of the codes; None: that of the tokens. Codes and tokens have generators of their own."""

    def __post_init__(self) -> None:
        check_choice("prompt", self.prompt, ("posterior", "prior"))
        for bit, value in self.held_bits:
            check_integer("held_bits", bit, minimum=0)
            check(value in (0, 1), f"held_bits: the value of bit {bit}", value, "0 or 1")
        if self.seed is not None:
            check_integer("seed", self.seed, minimum=0)


class RowCodes:
    """The codes of a batch of rows that end together, all drawn in advance; the prompts' may be the encoder's.

    Row ``r`` draws from generators of its own: its codes depend on its prompt, its given codes and ``seed + r`` alone.

    Args:
        lengths: tokens of each prompt.

    Attributes:
        codes: of prompts padded on the left, and of ``max_new_tokens`` after them.

    Raises: ValueError for given codes outside ``[0, 2**H)``, more rows of them than prompts, or a held bit that is
        none of the ``n_bits``.
    """

    def __init__(
        self,
        n_bits: int,
        lengths: Sequence[int],
        settings: SamplingSettings,
        plan: PlanSettings,
        device: torch.device,
    ) -> None:
        self.n_bits, self.settings, self.lengths, self.longest = n_bits, plan, lengths, max(lengths)
        self._check()
        seed = settings.seed if plan.seed is None else plan.seed
        self.generators = [_code_generator(seed + row, "posterior") for row in range(len(lengths))]
        n_tokens, count = self.longest + settings.max_new_tokens, 2**n_bits
        self.codes = torch.zeros(len(lengths), n_tokens, dtype=torch.long)
        self.is_given = torch.zeros(len(lengths), n_tokens, dtype=torch.bool)
        for row, length in enumerate(lengths):
            generator = _code_generator(seed + row, "prior")
            drawn = torch.randint(count, (length + settings.max_new_tokens,), generator=generator)
            self.codes[row, self.longest - length :] = self._held(drawn)
        self._give()
        self.codes, self.is_given = self.codes.to(device), self.is_given.to(device)

    def plan(self, first: int, n_tokens: int) -> Plan:
        """Of ``n_tokens`` tokens from ``first`` on."""
        return Plan(self.codes[:, first : first + n_tokens])

    def encode(self, logits: Float[Tensor, "B T H"]) -> None:
        """Draw the prompts' codes from the encoder's bit logits, but for those that are given."""
        given, codes = self.is_given[:, : self.longest], self.codes[:, : self.longest]
        self.codes[:, : self.longest] = torch.where(given, codes, self._from_posterior(logits))

    def row(self, index: int, n_new: int) -> list[int]:
        """Codes of a row's prompt and of ``n_new`` tokens after it."""
        codes: list[int] = self.codes[
            index, self.longest - self.lengths[index] : self.longest + n_new
        ].tolist()
        return codes

    def _from_posterior(self, logits: Float[Tensor, "B T H"]) -> Int[Tensor, "B T"]:
        """A row's draws are those of its real tokens, so that its pads do not matter."""
        rows = []
        for row, length, generator in zip(logits.cpu(), self.lengths, self.generators, strict=True):
            bits = sample_bits(row[self.longest - length :], generator=generator)
            code = self._held(bits_to_code(bits))
            rows.append(torch.cat([code.new_zeros(self.longest - length), code]))
        return torch.stack(rows).to(logits.device)

    def _held(self, codes: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        for bit, value in self.settings.held_bits:
            codes = codes | (1 << bit) if value else codes & ~(1 << bit)
        return codes

    def _give(self) -> None:
        for row, given in enumerate(self.settings.codes or ()):
            start = self.longest - self.lengths[row]
            for place, code in enumerate(given[: self.codes.shape[1] - start], start):
                if code != NOT_GIVEN:
                    self.codes[row, place], self.is_given[row, place] = code, True

    def _check(self) -> None:
        codes, count = self.settings.codes or (), 2**self.n_bits
        check(len(codes) <= len(self.lengths), "codes", len(codes), f"at most {len(self.lengths)} rows")
        for row, given in enumerate(codes):
            for code in given:
                inside = isinstance(code, int) and NOT_GIVEN <= code < count
                check(inside, f"codes[{row}]", code, f"an integer in [0, {count}), or -1: not given")
        for bit, _ in self.settings.held_bits:
            check(bit < self.n_bits, "held_bits", bit, f"below the model's {self.n_bits} bits")


def _code_generator(seed: int, source: Literal["prior", "posterior"]) -> torch.Generator:
    """Apart from the generator of a row's tokens, which is seeded with the plain number, and from each other."""
    offset = 0x7F4A7C15 if source == "prior" else 0x1CE4E5B9
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + offset) % 2**32)
