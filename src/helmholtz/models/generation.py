"""Sampling of new tokens: one sampler for every decoder, incremental, reproducible row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer, check_non_negative
from helmholtz.models.base import AbstractDecoder, LMState, evaluation_mode

PREFILL_CHUNK = 256
"""Prompt tokens read per call: bounds the memory of logits that nobody needs."""

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
    logits = logits - logits.amax(-1, keepdim=True)
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = (logits / settings.temperature).softmax(-1)
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
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(index, last).squeeze(-1)


def generate(
    model: AbstractDecoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    callback: TokenCallback | None = None,
) -> list[list[int]]:
    """Continue each prompt, token by token, with the state of the stream instead of the whole sequence.

    Prompts may differ in length. A row ends at a stop token, which is left out, or after ``max_new_tokens``;
    the call ends when all rows have. A row depends on its prompt and on ``seed + row`` alone: sampled alone
    with that seed it gives the same tokens, up to the rounding of logits, which differs between batch sizes.

    Args:
        callback: called with ``(row, token)`` for every token of the result as it appears.

    Returns: the new tokens of each row, without the prompt.
    Raises: ValueError for no or empty prompts, ids outside the vocabulary, or a prompt that with its
        continuation exceeds ``max_seq_len``.
    """
    _check_prompts(model, prompts, settings)
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(prompts))]
    results: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    with evaluation_mode(model):
        logits, state = _prefill(model, prompts)
        while True:
            tokens = _next_tokens(logits, settings, generators)
            for row in sorted(active):
                token = int(tokens[row])
                if token not in settings.stop_tokens:
                    results[row].append(token)
                    if callback is not None:
                        callback(row, token)
                if token in settings.stop_tokens or len(results[row]) == settings.max_new_tokens:
                    active.remove(row)
            if not active:
                return results
            logits, state = _advance(model, tokens.to(logits.device).unsqueeze(1), state, None)


def _prefill(model: AbstractDecoder, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, LMState]:
    """Read the prompts, padded on the left so that all rows end together."""
    longest, device = max(map(len, prompts)), model.embed.weight.device
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths.unsqueeze(1)
    equal = all(len(p) == longest for p in prompts)
    state = model.init_state(len(prompts))
    for part, part_mask in zip(tokens.split(PREFILL_CHUNK, 1), mask.split(PREFILL_CHUNK, 1), strict=True):
        logits, state = _advance(model, part, state, None if equal else part_mask)
    return logits, state


def _advance(
    model: AbstractDecoder, tokens: Tensor, state: LMState, mask: Tensor | None
) -> tuple[Float[Tensor, "B vocab"], LMState]:
    output = model.step(tokens, state, attention_mask=mask)
    assert output.state is not None
    return output.logits[:, -1], output.state


def _next_tokens(
    logits: Float[Tensor, "B vocab"], settings: SamplingSettings, generators: Sequence[torch.Generator]
) -> Int[Tensor, "B"]:
    if logits.isnan().any():
        raise ValueError("model: its logits are NaN; there is nothing to sample from")
    probabilities = sampling_probabilities(logits, settings)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    return draw(probabilities, uniform.to(logits.device)).cpu()


def _check_prompts(
    model: AbstractDecoder, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> None:
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
