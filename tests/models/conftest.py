"""Small decoders of every kind, with weights large enough that every part matters."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from helmholtz.layers.fem_config import PRIORS
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig, MixerOptions
from helmholtz.models.transformer import Transformer, TransformerConfig

SIZES = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}


def _transformer(**fields: object) -> Callable[[], AbstractDecoder]:
    return lambda: Transformer(TransformerConfig(**SIZES, **fields))


def _fem(**fields: object) -> Callable[[], AbstractDecoder]:
    options = MixerOptions(tdc_width=8)  # a layer norm over the default 2 channels would only keep signs
    return lambda: FEMLM(FEMLMConfig(**SIZES, mixer=options, d_ff=80, **fields))


DECODERS: dict[str, Callable[[], AbstractDecoder]] = {
    "transformer": _transformer(),
    "transformer-gqa-untied": _transformer(n_kv_heads=2, tie_embeddings=False),
    "fem-hybrid": _fem(prior=("gla", "softmax"), n_kv_heads=2, tie_embeddings=False),
    **{f"fem-{prior}": _fem(prior=prior) for prior in PRIORS},
}


@torch.no_grad()
def liven(model: AbstractDecoder) -> AbstractDecoder:
    """Redraw all matrices at the scale that keeps variance, those included that start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
    model.embed.weight.normal_(std=0.5)
    return model.eval()


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest) -> AbstractDecoder:
    torch.manual_seed(1)
    return liven(DECODERS[request.param]())


@pytest.fixture
def transformer() -> AbstractDecoder:
    torch.manual_seed(1)
    return liven(DECODERS["transformer"]())
