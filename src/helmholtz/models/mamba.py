"""A decoder of Mamba-2 blocks: no attention, no positions, no feed-forward, and a state of constant size."""

from dataclasses import dataclass
from typing import ClassVar, final

from helmholtz._checks import check_divides, check_integer
from helmholtz.layers.mixer_config import MambaMixerConfig
from helmholtz.models.base import FlatConfig, LayerConfig, ModelConfig
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig(FlatConfig):
    """Sizes of a Mamba decoder."""

    d_inner: int | None = None
    """Channels of a mixer; None means 2 d_model."""
    d_state: int = 64
    """State per channel."""
    d_conv: int = 4
    """Tokens that the convolution before the recurrence sees."""
    d_head: int = 64
    """Channels that share a decay; a divisor of d_inner."""

    def __post_init__(self) -> None:
        FlatConfig.__post_init__(self)
        self._fill("d_inner", 2 * self.d_model)
        for name in ("d_inner", "d_state", "d_conv"):
            check_integer(name, getattr(self, name))
        assert self.d_inner is not None
        check_divides("d_head", self.d_head, "d_inner", self.d_inner)

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        mixer = MambaMixerConfig(
            d_model=self.d_model,
            d_inner=self.d_inner,
            d_state=self.d_state,
            d_conv=self.d_conv,
            d_head=self.d_head,
        )
        return (LayerConfig(mixer=mixer),) * self.n_layers


@final
class Mamba(Decoder):
    """Decoder of Mamba-2 blocks (Dao & Gu, "Transformers are SSMs", 2024): norm, mixer, residual."""

    config_class: ClassVar[type[ModelConfig]] = MambaConfig
    config: MambaConfig


def small(vocab_size: int) -> MambaConfig:
    """About 0.8 M parameters beside the embedding, as ``transformer.small``: twice its blocks, each half as large."""
    return MambaConfig(vocab_size=vocab_size, d_model=128, n_layers=7, d_state=32, d_head=32, max_seq_len=256)


def medium(vocab_size: int) -> MambaConfig:
    """About 25 M parameters beside the embedding, as ``transformer.medium``."""
    return MambaConfig(vocab_size=vocab_size, d_model=512, n_layers=15, max_seq_len=1024)
