"""The models of the language study: all of a size have the parameters of its baseline within two percent."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from helmholtz._checks import check, check_choice
from helmholtz.layers.sizing import count_parameters, matched_size
from helmholtz.models import MODELS, Decoder, FreeTransformer, Mamba, MambaHopfield
from helmholtz.models.base import ModelConfig
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformerConfig
from helmholtz.models.mamba import MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfieldConfig
from helmholtz.models.transformer import TransformerConfig

TOLERANCE = 0.02
N_HEADS = 4


@dataclass(frozen=True, slots=True)
class Size:
    """Width and depth of the baseline."""

    d_model: int
    n_layers: int


SIZES = {"s": Size(48, 2), "m": Size(64, 3), "l": Size(96, 4)}
ConfigMaker = Callable[[dict[str, Any], int], ModelConfig]
"""Of the sizes that all models share, and the parameters to match."""


def _baseline(sizes: dict[str, Any], budget: int) -> ModelConfig:
    return TransformerConfig(**sizes, n_heads=N_HEADS)


def _fem(prior: Any) -> ConfigMaker:
    def make(sizes: dict[str, Any], budget: int) -> ModelConfig:
        return FEMLMConfig(**sizes, n_heads=N_HEADS, prior=prior)

    return make


def _free(sizes: dict[str, Any], budget: int) -> ModelConfig:
    """Six bits; the feed-forwards pay for encoder and table."""
    first = FreeTransformerConfig(**sizes, n_heads=N_HEADS, n_latent_bits=6)
    return _matched(FreeTransformer, first, "d_ff", budget)


def _mamba(sizes: dict[str, Any], budget: int) -> ModelConfig:
    """As in the demo 15/4 as many channels as the width; the states take up the rest."""
    d_inner = sizes["d_model"] * 15 // 4
    return _matched(Mamba, MambaConfig(**sizes, d_inner=d_inner, d_head=d_inner // 5), "d_state", budget)


def _mamba_hopfield(sizes: dict[str, Any], budget: int) -> ModelConfig:
    """As in the demo one block more; 15/8 as many channels as the width, the patterns take up the rest."""
    sizes = {**sizes, "n_layers": sizes["n_layers"] + 1}
    d_inner = sizes["d_model"] * 15 // 8
    first = MambaHopfieldConfig(**sizes, d_inner=d_inner, d_head=d_inner // 3, d_state=16)
    return _matched(MambaHopfield, first, "n_patterns", budget)


def _matched(architecture: type[Decoder], config: Any, name: str, budget: int) -> ModelConfig:
    """``config`` with the field ``name`` as large as the budget wants."""
    size = matched_size(lambda n: architecture(replace(config, **{name: n})), budget, name=name)
    matched: ModelConfig = replace(config, **{name: size})
    return matched


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A row of the study."""

    label: str
    architecture: str
    config: ConfigMaker


LANGUAGE_MODELS = {
    "baseline": LanguageModel("baseline (Llama-style)", "transformer", _baseline),
    "fem_softmax": LanguageModel("FEM, softmax prior", "fem_lm", _fem("softmax")),
    "fem_gla": LanguageModel("FEM, GLA prior", "fem_lm", _fem("gla")),
    "free_transformer": LanguageModel("Free Transformer", "free_transformer", _free),
    "mamba": LanguageModel("Mamba", "mamba", _mamba),
    "mamba_hopfield": LanguageModel("Mamba-Hopfield", "mamba_hopfield", _mamba_hopfield),
}


@functools.cache
def model_config(name: str, size: Size, *, vocab_size: int, max_seq_len: int) -> ModelConfig:
    """The config of a row at a size, matched to the baseline.

    Raises: ValueError for an unknown name, or if nothing within two percent can be found.
    """
    check_choice("models", name, LANGUAGE_MODELS)
    sizes = {
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "d_model": size.d_model,
        "n_layers": size.n_layers,
    }
    budget = n_parameters("transformer", _baseline(sizes, 0))
    row = LANGUAGE_MODELS[name]
    config = row.config(sizes, budget)
    found = n_parameters(row.architecture, config)
    wanted = f"{budget} within {TOLERANCE:.0%}"
    check(abs(found - budget) <= TOLERANCE * budget, f"parameters of {name}", found, wanted)
    return config


def n_parameters(architecture: str, config: ModelConfig) -> int:
    """Counted on a model that is built without memory."""
    with torch.device("meta"):
        return count_parameters(MODELS[architecture](config))
