"""Which mixer a layer has: a config per kind, told apart by ``kind`` in files, and the one place that builds it."""

import abc
from dataclasses import dataclass
from typing import Any, Literal

from helmholtz._checks import check, check_choice, check_divides, check_integer, check_positive
from helmholtz.layers.attention import Attention, check_heads
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.mamba import MambaMixer


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstractMixerConfig(abc.ABC):
    """What a mixer of one's own is made of.

    A subclass gives ``kind`` a default of its own, by which files name it as soon as the class exists. One whose mixer
    may also see later tokens has a field ``causal``.
    """

    kind: str
    d_model: int
    """Width of the input and the output."""

    @abc.abstractmethod
    def build(self) -> AbstractMixer[Any]:
        """The mixer, initialised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """What an ``Attention`` is made of."""

    kind: Literal["attention"] = "attention"
    d_model: int
    """Width of the input and the output."""
    n_heads: int
    """Query heads; a divisor of d_model."""
    n_kv_heads: int | None = None
    """Key/value heads, a divisor of n_heads; None means n_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    causal: bool = True
    """Let a token see itself and the past only."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("attention",))
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        assert self.n_kv_heads is not None
        check_heads(self.d_model, self.n_heads, self.n_kv_heads)
        check_positive("rope_theta", self.rope_theta)
        check(isinstance(self.causal, bool), "causal", self.causal, "true or false")


@dataclass(frozen=True, kw_only=True)
class MambaSizes:
    """Sizes of a ``MambaMixer`` beside its width. Without slots: it is the second base of configs that have them."""

    d_inner: int | None = None
    """Channels of the state-space model; None means 2 d_model."""
    d_state: int = 64
    """State size per channel."""
    d_conv: int = 4
    """Width of the causal convolution before the recurrence, in tokens."""
    d_head: int = 64
    """Channels that share a decay; a divisor of d_inner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaMixerConfig(MambaSizes):
    """What a ``MambaMixer`` is made of; it is always causal."""

    kind: Literal["mamba"] = "mamba"
    d_model: int
    """Width of the input and the output."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("mamba",))
        check_integer("d_model", self.d_model)
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", 2 * self.d_model)
        for name in ("d_inner", "d_state", "d_conv"):
            check_integer(name, getattr(self, name))
        assert self.d_inner is not None
        check_divides("d_head", self.d_head, "d_inner", self.d_inner)


MixerConfig = AttentionConfig | FreeEnergyMixerConfig | MambaMixerConfig | AbstractMixerConfig


def is_causal(config: MixerConfig) -> bool:
    """Whether the mixer of this config lets no token see a later one."""
    return getattr(config, "causal", True)


def build_mixer(config: MixerConfig) -> AbstractMixer[Any]:
    """The mixer that a config describes, initialised."""
    c = config
    if isinstance(c, FreeEnergyMixerConfig):
        return FreeEnergyMixer(c)
    if isinstance(c, AttentionConfig):
        return Attention(
            c.d_model, c.n_heads, n_kv_heads=c.n_kv_heads, rope_theta=c.rope_theta, causal=c.causal
        )
    if isinstance(c, MambaMixerConfig):
        assert c.d_inner is not None
        return MambaMixer(c.d_model, d_inner=c.d_inner, d_state=c.d_state, d_conv=c.d_conv, d_head=c.d_head)
    return c.build()
