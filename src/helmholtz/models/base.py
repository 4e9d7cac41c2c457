"""What configs of decoders have in common, and evaluation mode.

A config answers three questions, and a ``Decoder`` is built from the answers: which layers (``layer_configs``), which
latent plan (``plan_config``) and which equilibrium (``equilibrium_config``). ``DecoderConfig`` holds the answers
themselves; the architectures with a name compute them from a few flat sizes.
"""

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from helmholtz._checks import (
    check,
    check_choice,
    check_divides,
    check_fraction,
    check_integer,
    check_positive,
)
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.mixer_config import AttentionConfig, MixerConfig
from helmholtz.models.codec import config_from_dict
from helmholtz.ops.binary_latent import MAX_LATENT_BITS

MOST_LAYERS = 10_000

ConfigT = TypeVar("ConfigT", bound="ModelConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One block: a mixer and mostly a feed-forward."""

    mixer: MixerConfig
    """Told apart by its ``kind`` in files."""
    d_ff: int | None = None
    """Width of the feed-forward; None: there is none."""

    def __post_init__(self) -> None:
        if self.d_ff is not None:
            check_integer("d_ff", self.d_ff)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """A latent code per token, and the block whose mixer has ``x`` and the codes' vectors as its source."""

    layer: int
    """Index of that block, from 0."""
    n_bits: int = 8
    """Bits of a code, 1 to 16. A table holds 2**n_bits vectors."""
    post_sampler: Literal["table", "bits"] = "table"
    """A vector per code, or the sum of a vector per bit."""
    encoder: LayerConfig | None = None
    """The block that reads codes from the text, not causal. None means attention with the heads and the feed-forward
    of block ``layer`` where it has them."""

    def __post_init__(self) -> None:
        check_integer("layer", self.layer, minimum=0)
        check_integer("n_bits", self.n_bits)
        check(self.n_bits <= MAX_LATENT_BITS, "n_bits", self.n_bits, f"in 1..{MAX_LATENT_BITS}")
        check_choice("post_sampler", self.post_sampler, ("table", "bits"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Sizes that every decoder has. Fields left None are filled in, so a saved config is complete."""

    vocab_size: int
    """Number of token ids."""
    d_model: int = 256
    """Width of the residual stream."""
    max_seq_len: int = 1024
    """Longest sequence, in tokens without pads."""
    tie_embeddings: bool = True
    """Whether the output matrix shares the embedding's weights."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    dropout: float = 0.0
    """Dropout probability of what each block adds to the residual stream."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights; None: (3 fan_in)^(-1/2), which keeps the variance of signals at every
    width."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "max_seq_len"):
            check_integer(name, getattr(self, name))
        check_positive("norm_eps", self.norm_eps)
        check_fraction("dropout", self.dropout)
        if self.initializer_range is not None:
            check_positive("initializer_range", self.initializer_range)
        check(isinstance(self.tie_embeddings, bool), "tie_embeddings", self.tie_embeddings, "true or false")

    @abc.abstractmethod
    def layer_configs(self) -> tuple[LayerConfig, ...]:
        """The blocks, from the first to the last."""

    def plan_config(self) -> PlanConfig | None:
        """The latent plan, complete with its encoder; None: there is none."""
        return None

    def equilibrium_config(self) -> EquilibriumConfig | None:
        """The equilibrium layer between the last block and the output; None: there is none."""
        return None

    def _fill(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON; ``from_dict`` gives an equal config back.

        ``initializer_range`` is there only where it is set: a model that is saved has started.
        """
        values = asdict(self)
        if self.initializer_range is None:
            del values["initializer_range"]
        return values

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The config with these values. Raises: ValueError for an unknown key, naming the nearest one."""
        config: ConfigT = config_from_dict(cls, values, cls.__name__)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatConfig(ModelConfig):
    """Sizes of a decoder whose layers follow from a few numbers."""

    n_layers: int = 4
    """Number of blocks."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_integer("n_layers", self.n_layers)
        check(self.n_layers <= MOST_LAYERS, "n_layers", self.n_layers, f"at most {MOST_LAYERS:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModelConfig(FlatConfig):
    """Sizes of a decoder whose blocks have heads, rotary positions and a feed-forward; attention if nothing else."""

    n_heads: int = 4
    """Number of query heads, a divisor of d_model."""
    n_kv_heads: int | None = None
    """Number of key/value heads, a divisor of n_heads; None means n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward; None means 8/3 d_model rounded up to a multiple of 8."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    def __post_init__(self) -> None:
        FlatConfig.__post_init__(self)
        check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        self._fill("n_kv_heads", self.n_heads)
        check_divides("n_kv_heads", self.n_kv_heads or 0, "n_heads", self.n_heads)
        if self.d_ff is None:
            self._fill("d_ff", self._derived_d_ff())
        check_integer("d_ff", self.d_ff)
        check_positive("rope_theta", self.rope_theta)
        self.layer_configs()  # raises where a block cannot be made

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        return (self._attention_layer(causal=True),) * self.n_layers

    def _attention_layer(self, *, causal: bool) -> LayerConfig:
        mixer = AttentionConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            rope_theta=self.rope_theta,
            causal=causal,
        )
        return LayerConfig(mixer=mixer, d_ff=self.d_ff)

    def _derived_d_ff(self) -> int:
        return default_d_ff(self.d_model)


def default_d_ff(d_model: int) -> int:
    """Width of a SwiGLU with about the parameters of a plain feed-forward of width 4 d_model: 8/3, in eights."""
    return -(-8 * d_model // 24) * 8


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside the block; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
