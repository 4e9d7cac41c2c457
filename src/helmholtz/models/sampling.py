"""How a token is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check, check_integer, check_non_negative
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How to continue a prompt. The filters apply in the order temperature, top_k, top_p.

    Raises: ValueError naming the field that is out of range.
    """

    max_new_tokens: int = 128
    """Longest continuation."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens whose probabilities reach p, at least one."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a row; they are not part of the result."""
    seed: int = 0
    """Row r draws from its own generator, seeded with seed + r."""

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens)
        check_non_negative("temperature", self.temperature)
        if self.top_k is not None:
            check_integer("top_k", self.top_k)
        if self.top_p is not None:
            check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        for token in self.stop_tokens:
            check_integer("stop_tokens", token, minimum=0)
        check_integer("seed", self.seed, minimum=0)


def next_tokens(
    logits: Float[Tensor, "B vocab"], settings: SamplingSettings, uniform: Float[Tensor, "B 1"]
) -> Int[Tensor, "B"]:
    """A token of each row as ``sampling_probabilities`` and ``draw`` give it; -1 of a row whose logits are NaN.

    Cost: the kernel ranks as many tokens as are kept, the plain form sorts all.
    """
    if kernels.usable("sample", logits, uniform):
        top = settings.top_k or 0, settings.top_p or 0.0
        tokens: Tensor = torch.ops.helmholtz.sample(logits, uniform, settings.temperature, *top)
        return tokens
    if settings.temperature == 0:
        return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
    probabilities = sampling_probabilities(logits, settings)
    return draw(probabilities, uniform).masked_fill(probabilities[:, 0].isnan(), -1)


def sampling_probabilities(
    logits: Float[Tensor, "B vocab"], settings: SamplingSettings
) -> Float[Tensor, "B vocab"]:
    """The distribution from which the next token is drawn, in float64: tempered, filtered, summing to one.

    Equal logits are ranked by id, lower first, so that exactly ``top_k`` tokens survive.
    """
    logits = logits.double()
    if settings.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
    if settings.temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
    probabilities = logits.softmax(-1)
    if settings.top_k is None and settings.top_p is None:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if settings.top_k is not None:
        ranked[:, settings.top_k :] = 0
    if settings.top_p is not None:
        ranked = ranked / ranked.sum(-1, keepdim=True)
        mass_before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(mass_before >= settings.top_p, 0)
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
    return kept / kept.sum(-1, keepdim=True)


def draw(probabilities: Float[Tensor, "B vocab"], uniform: Float[Tensor, "B 1"]) -> Int[Tensor, "B"]:
    """Invert each row's cumulative distribution at ``uniform`` in [0, 1); never a token of probability 0."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform * total, right=True)
    last = torch.searchsorted(cumulative, total)  # what follows adds nothing to the sum
    return torch.minimum(index, last).squeeze(-1)


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], settings: SamplingSettings) -> None:
    """Raises: ValueError for prompts that the model cannot continue, as ``generate`` says."""
    vocabulary, longest = model.config.vocab_size, model.config.max_seq_len
    if not prompts:
        raise ValueError("prompts: wanted at least one, got none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{row}] is empty; start it with at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"prompts[{row}]: id {token} is not in the vocabulary of {vocabulary} ids")
        if len(prompt) + settings.max_new_tokens > longest:
            raise ValueError(
                f"prompts[{row}]: {len(prompt)} tokens and max_new_tokens={settings.max_new_tokens} "
                f"exceed max_seq_len={longest}"
            )
