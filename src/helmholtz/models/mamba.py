"""A decoder of Mamba-2 blocks: no attention, no positions, no feed-forward, and a state of constant size."""

from dataclasses import dataclass, fields
from typing import ClassVar, final

from helmholtz.layers.mixer_config import MambaMixerConfig, MambaSizes
from helmholtz.models.base import FlatConfig, LayerConfig, ModelConfig
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig(MambaSizes, FlatConfig):
    """Sizes of a Mamba decoder."""

    def __post_init__(self) -> None:
        FlatConfig.__post_init__(self)
        self._fill("d_inner", self._mixer().d_inner)

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        return (LayerConfig(mixer=self._mixer()),) * self.n_layers

    def _mixer(self) -> MambaMixerConfig:
        sizes = {field.name: getattr(self, field.name) for field in fields(MambaSizes)}
        return MambaMixerConfig(d_model=self.d_model, **sizes)


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
