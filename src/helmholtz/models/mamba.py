"""A decoder of Mamba-2 blocks: no attention, no positions, no feed-forward, and a state of constant size."""

from dataclasses import dataclass
from typing import ClassVar, final

from helmholtz._checks import check_divides, check_integer
from helmholtz.layers.mamba import MambaMixer
from helmholtz.models.base import AbstractDecoder, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig(ModelConfig):
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
        ModelConfig.__post_init__(self)
        self._fill("d_inner", 2 * self.d_model)
        for name in ("d_inner", "d_state", "d_conv"):
            check_integer(name, getattr(self, name))
        assert self.d_inner is not None
        check_divides("d_head", self.d_head, "d_inner", self.d_inner)


@final
class Mamba(AbstractDecoder):
    """Decoder of Mamba-2 blocks (Dao & Gu, "Transformers are SSMs", 2024): norm, mixer, residual."""

    config_class: ClassVar[type[ModelConfig]] = MambaConfig
    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)

    def build_mixer(self, layer: int) -> MambaMixer:
        c = self.config
        assert c.d_inner is not None
        return MambaMixer(c.d_model, d_inner=c.d_inner, d_state=c.d_state, d_conv=c.d_conv, d_head=c.d_head)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the mixers in the backward pass instead of keeping what it needs: slower, less memory."""
        self._checkpoint_gradients(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self._checkpoint_gradients(False)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        for block in self.blocks:
            assert isinstance(block.mixer, MambaMixer)
            block.mixer.gradient_checkpointing = enabled


def small(vocab_size: int) -> MambaConfig:
    """About 0.8 M parameters beside the embedding, as ``transformer.small``: twice its blocks, each half as large."""
    return MambaConfig(vocab_size=vocab_size, d_model=128, n_layers=7, d_state=32, d_head=32, max_seq_len=256)


def medium(vocab_size: int) -> MambaConfig:
    """About 25 M parameters beside the embedding, as ``transformer.medium``."""
    return MambaConfig(vocab_size=vocab_size, d_model=512, n_layers=15, max_seq_len=1024)
