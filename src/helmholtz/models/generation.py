"""Continuing prompts: one call for every decoder, incremental, reproducible row by row."""

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models.decoder import Decoder
from helmholtz.models.outputs import LMState
from helmholtz.models.planning import generate_planned
from helmholtz.models.sampling import AbstractStream, SamplingSettings, TokenCallback, continue_rows

__all__ = ["SamplingSettings", "TokenCallback", "generate"]

PREFILL_CHUNK = 256
"""Prompt tokens read per call: bounds the memory of logits that nobody needs."""


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
    if model.plan is not None:
        return [row.tokens for row in generate_planned(model, prompts, settings, callback=callback)]
    with one_convergence_warning(model):
        return continue_rows(_DecoderStream(model), prompts, settings, callback)


class _DecoderStream(AbstractStream):
    state: LMState

    def prefill(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B vocab"]:
        self.state = self.model.init_state(len(tokens))
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            logits = self._read(tokens[:, part], None if mask is None else mask[:, part])
        return logits

    def step(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B vocab"]:
        return self._read(tokens, None)

    def _read(self, tokens: Tensor, mask: Tensor | None) -> Float[Tensor, "B vocab"]:
        output = self.model.step(tokens, self.state, attention_mask=mask)
        assert output.state is not None
        self.state = output.state
        return output.logits[:, -1]
