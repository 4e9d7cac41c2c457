"""Sampling under a plan: who plans the prompt, which codes are given, which bits are held."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.layers.latent import Plan
from helmholtz.layers.placement import device_of
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.models.outputs import LMState
from helmholtz.models.sampling import AbstractStream, SamplingSettings, TokenCallback, continue_rows
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


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One continuation and the plan it was written under."""

    tokens: list[int]
    """The new tokens."""
    codes: list[int]
    """Codes of the prompt's tokens and of the new ones."""


def generate_planned(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    plan: PlanSettings | None = None,
    *,
    callback: TokenCallback | None = None,
) -> list[PlannedRow]:
    """``generate``, with a say in the plan, which is returned with the text.

    Row ``r`` draws its codes from a generator of its own, before the first token: tokens and codes of a row depend on
    its prompt, its given codes and ``seed + r`` alone. The encoder runs once, over the prompts.

    Args:
        plan: None is ``PlanSettings()``.

    Raises: ValueError as ``generate``, for given codes outside ``[0, 2**H)``, more rows of them than prompts, or a
        held bit that the model does not have.
    """
    stream = PlannedStream(model, [len(prompt) for prompt in prompts], settings, plan or PlanSettings())
    with one_convergence_warning(model):
        rows = continue_rows(stream, prompts, settings, callback)
    codes = [
        row[stream.longest - len(prompt) :][: len(prompt) + len(tokens)]
        for row, prompt, tokens in zip(stream.codes.tolist(), prompts, rows, strict=True)
    ]
    return [PlannedRow(tokens, code) for tokens, code in zip(rows, codes, strict=True)]


class PlannedStream(AbstractStream):
    """A batch under way whose codes are all drawn in advance; the prompt's may be replaced by the encoder's."""

    state: LMState

    def __init__(
        self, model: Decoder, lengths: Sequence[int], settings: SamplingSettings, plan: PlanSettings
    ) -> None:
        super().__init__(model)
        self.settings, self.lengths, self.longest = plan, lengths, max(lengths, default=0)
        self.n_bits, device = require_plan(model).n_bits, device_of(model)
        self._check()
        seed = settings.seed if plan.seed is None else plan.seed
        self.generators = [_code_generator(seed + row, "posterior") for row in range(len(lengths))]
        n_tokens, count = self.longest + settings.max_new_tokens, 2**self.n_bits
        self.codes = torch.zeros(len(lengths), n_tokens, dtype=torch.long)
        self.is_given = torch.zeros(len(lengths), n_tokens, dtype=torch.bool)
        for row, length in enumerate(lengths):
            generator = _code_generator(seed + row, "prior")
            drawn = torch.randint(count, (length + settings.max_new_tokens,), generator=generator)
            self.codes[row, self.longest - length :] = self._held(drawn)
        self._give()
        self.codes, self.is_given = self.codes.to(device), self.is_given.to(device)
        self.position = 0

    def prefill(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B vocab"]:
        half = self.model.lower(tokens, self.model.init_state(len(tokens)), attention_mask=mask)
        self.position = tokens.shape[1]
        if self.settings.prompt == "posterior":
            drawn = self._from_posterior(self.model.posterior(half))
            given = self.is_given[:, : self.position]
            self.codes[:, : self.position] = torch.where(given, self.codes[:, : self.position], drawn)
        x, state = self.model.upper_blocks(half, Plan(self.codes[:, : self.position]))
        assert state is not None
        self.state = state
        return self.model.unembed(self.model.norm(x[:, -1]))

    def step(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B vocab"]:
        place = self.position
        self.position += 1
        output = self.model(tokens, z=Plan(self.codes[:, place : place + 1]), state=self.state)
        assert output.state is not None
        self.state = output.state
        return output.logits[:, -1]

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
