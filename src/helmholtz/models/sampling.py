"""How a token is drawn, and the loop that continues rows of text: one for every decoder."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer, check_non_negative
from helmholtz.layers.placement import device_of
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder

TokenCallback = Callable[[int, int], None]
"""Called with ``(row, token)`` as soon as a token is known."""


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


class AbstractStream(abc.ABC):
    """Rows of text that a model is reading and continuing."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @abc.abstractmethod
    def prefill(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B vocab"]:
        """Read the prompts, padded on the left so that all rows end together; logits of the first new token."""

    @abc.abstractmethod
    def step(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B vocab"]:
        """Read one more token per row; logits of the next."""


def continue_rows(
    stream: AbstractStream,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    callback: TokenCallback | None,
) -> list[list[int]]:
    """Sample until every row has ended; the new tokens of each row. Raises: as ``generate``."""
    check_prompts(stream.model, prompts, settings)
    results: list[list[int]] = [[] for _ in prompts]
    active, device = set(range(len(prompts))), device_of(stream.model)
    with evaluation_mode(stream.model), torch.inference_mode():
        uniform = _uniform(len(prompts), settings).to(device)
        logits = stream.prefill(*_left_padded(prompts, device))
        for count in range(settings.max_new_tokens):
            tokens = _next_tokens(logits, settings, uniform[:, count : count + 1])
            for row, token in enumerate(tokens.tolist()):
                if row in active and token in settings.stop_tokens:
                    active.remove(row)
                elif row in active:
                    results[row].append(token)
                    if callback is not None:
                        callback(row, token)
            if not active or count + 1 == settings.max_new_tokens:
                break
            logits = stream.step(tokens.unsqueeze(1))
    return results


def _uniform(rows: int, settings: SamplingSettings) -> Float[Tensor, "B N"]:
    """What decides each token of each row: a generator per row, so that rows do not depend on each other."""
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(rows)]
    draws = [torch.rand(settings.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(draws)


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return tokens, None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return tokens, torch.arange(longest, device=device) >= longest - lengths.unsqueeze(1)


def _next_tokens(
    logits: Float[Tensor, "B vocab"], settings: SamplingSettings, uniform: Float[Tensor, "B 1"]
) -> Int[Tensor, "B"]:
    if logits.isnan().any():
        raise ValueError("model: its logits are NaN; there is nothing to sample from")
    return draw(sampling_probabilities(logits, settings), uniform)


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
