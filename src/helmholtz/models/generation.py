"""Continuing prompts: one stream and one loop for every decoder, incremental, reproducible row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.layers.latent import Plan
from helmholtz.layers.placement import device_of
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, PlanOf, require_plan
from helmholtz.models.outputs import LMState, LowerOutput
from helmholtz.models.planning import PlanSettings, RowCodes
from helmholtz.models.sampling import SamplingSettings, check_prompts, next_tokens

__all__ = ["PlannedRow", "SamplingSettings", "Stream", "TokenCallback", "generate", "generate_planned"]

PREFILL_CHUNK = 256
"""Prompt tokens read per call, unless an encoder reads them: bounds the memory of logits that nobody needs."""

TokenCallback = Callable[[int, int], None]
"""Called with ``(row, token)`` as soon as a token is known."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One continuation and the plan it was written under."""

    tokens: list[int]
    """The new tokens."""
    codes: list[int]
    """Codes of the prompt's tokens and of the new ones."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    callback: TokenCallback | None = None,
) -> list[list[int]]:
    """Continue each prompt, token by token, with the state of the stream instead of the whole sequence.

    Prompts may differ in length. A model with a plan plans as ``PlanSettings()`` says: the prompt by its encoder, each
    new token by the prior. A row ends at a stop token, which is left out, or after ``max_new_tokens``;
    the call ends when all rows have. A row depends on its prompt and on ``seed + row`` alone: sampled alone
    with that seed it gives the same tokens, up to the rounding of logits, which differs between batch sizes.

    Args:
        callback: called with ``(row, token)`` for every token of the result as it appears.

    Returns: the new tokens of each row, without the prompt.
    Raises: ValueError for no or empty prompts, ids outside the vocabulary, or a prompt that with its
        continuation exceeds ``max_seq_len``.
    Warns: ConvergenceWarning, once, if equilibria did not converge.
    """
    return _continued(model, prompts, settings, None, callback)[0]


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

    Raises: ValueError as ``generate``, for given codes outside ``[0, 2**H)``, more rows of them than prompts, a held
        bit that the model does not have, or a model without a plan.
    """
    require_plan(model)
    rows, codes = _continued(model, prompts, settings, plan, callback)
    assert codes is not None
    return [PlannedRow(tokens, codes.row(row, len(tokens))) for row, tokens in enumerate(rows)]


class Stream:
    """Rows of text that a model is reading and continuing; of a model with a plan, under codes drawn in advance.

    Args:
        lengths: tokens of each prompt.
        plan: None is ``PlanSettings()``.

    Attributes:
        codes: None of a model without a plan.
    """

    def __init__(
        self,
        model: Decoder,
        lengths: Sequence[int],
        settings: SamplingSettings,
        plan: PlanSettings | None = None,
    ) -> None:
        self.model, self.codes = model, None
        if model.plan is not None:
            plan = plan or PlanSettings()
            self.codes = RowCodes(model.plan.n_bits, lengths, settings, plan, device_of(model))
        length = max(lengths) + settings.max_new_tokens
        self.state: LMState = model.init_state(len(lengths), length=length, encode_again=False)

    def prefill(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B vocab"]:
        """Read the prompts, padded on the left so that all rows end together; logits of the first new token."""
        if self.codes is not None and self.codes.settings.prompt == "posterior":
            return self._read(tokens, mask, self._encoded)  # at once, as the encoder reads all of it
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            logits = self.step(tokens[:, part], None if mask is None else mask[:, part])
        return logits

    def step(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B vocab"]:
        """Read more tokens of every row; logits of the next."""
        plan = None if self.codes is None else self.codes.plan(self.state.n_read, tokens.shape[1])
        return self._read(tokens, mask, plan)

    def _read(
        self, tokens: Tensor, mask: Tensor | None, plan: Plan | PlanOf | None
    ) -> Float[Tensor, "B vocab"]:
        output = self.model.step(tokens, self.state, attention_mask=mask, z=plan)
        assert output.state is not None
        self.state = output.state
        return output.logits[:, -1]

    def _encoded(self, half: LowerOutput) -> Plan:
        assert self.codes is not None
        self.codes.encode(self.model.posterior(half))
        return self.codes.plan(0, half.x.shape[1])


def _continued(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    plan: PlanSettings | None,
    callback: TokenCallback | None,
) -> tuple[list[list[int]], RowCodes | None]:
    """Sample until every row has ended; the new tokens of each row, and the codes of all."""
    check_prompts(model, prompts, settings)
    results: list[list[int]] = [[] for _ in prompts]
    active, device = set(range(len(prompts))), device_of(model)
    with one_convergence_warning(model), evaluation_mode(model), torch.inference_mode():
        stream = Stream(model, [len(prompt) for prompt in prompts], settings, plan)
        uniform = _uniform(len(prompts), settings).to(device)
        logits = stream.prefill(*_left_padded(prompts, device))
        for count in range(settings.max_new_tokens):
            tokens = next_tokens(logits, settings, uniform[:, count : count + 1])
            for row, token in enumerate(tokens.tolist()):
                if token < 0:
                    raise ValueError("model: its logits are NaN; there is nothing to sample from")
                if row in active and token in settings.stop_tokens:
                    active.remove(row)
                elif row in active:
                    results[row].append(token)
                    if callback is not None:
                        callback(row, token)
            if not active or count + 1 == settings.max_new_tokens:
                break
            logits = stream.step(tokens.unsqueeze(1))
    return results, stream.codes


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
