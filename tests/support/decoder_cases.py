"""Decoders whose every weight matters, and Free Transformers with plans that tests can repeat."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helmholtz.layers.latent import LatentEncoder, Plan, TablePostSampler
from helmholtz.models.decoder import Decoder
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.outputs import LMOutput

SIZES: dict[str, Any] = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
N_BITS = 5


@torch.no_grad()
def liven(model: Decoder) -> Decoder:
    """Redraw all matrices at the scale that keeps variance, those included that start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
        elif isinstance(module, TablePostSampler):
            module.weight.normal_()
        elif isinstance(module, LatentEncoder):
            module.query.normal_()
    model.embed.weight.normal_(std=0.5)
    return model.eval()


def make_free(seed: int = 1, **fields: Any) -> FreeTransformer:
    """A lively Free Transformer of 3 layers, the plan entering the second, unless ``fields`` say otherwise."""
    torch.manual_seed(seed)
    sizes = SIZES | {"n_layers": 3, "n_latent_bits": N_BITS} | fields
    model = liven(FreeTransformer(FreeTransformerConfig(**sizes)))
    assert isinstance(model, FreeTransformer)
    return model


def tokens_of(batch: int, time: int, seed: int = 0, vocabulary: int = 37) -> Tensor:
    return torch.randint(vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))


def codes_of(batch: int, time: int, seed: int = 7, n_bits: int = N_BITS) -> Tensor:
    return torch.randint(2**n_bits, (batch, time), generator=torch.Generator().manual_seed(seed))


def plan_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call gives no plan, make each token's code a function of the token, not of chance.

    The logits are the encoder's own, so that the gradient takes its way; they change no value.
    """

    def planned(draw_plan: Callable[..., LMOutput]) -> Callable[..., LMOutput]:
        def call(
            self: Decoder,
            tokens: Tensor,
            *state: Any,
            z: Plan | None = None,
            z_init: Tensor | None = None,
            **masks: Any,
        ) -> LMOutput:
            if z is not None or self.plan is None:
                return draw_plan(self, tokens, *state, z=z, z_init=z_init, **masks)
            half = self.lower(tokens, *state, **masks)
            code = (5 * tokens + 3) % 2**self.plan.n_bits
            return self.upper(half, Plan(code, self.posterior(half)), z_init=z_init)

        return call

    for name in ("forward", "step"):
        monkeypatch.setattr(Decoder, name, planned(getattr(Decoder, name)))
