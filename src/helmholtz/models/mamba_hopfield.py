"""A Mamba decoder with a per-token equilibrium (DEQ) layer, of the context, the past and a Hopfield memory.

Mamba-2 blocks read the sequence. From the normed stream ``c`` one more recurrence gives every token the coefficients of
an energy over ``z``: what the context asks for, how a step of the recurrence would answer to ``z``, and how near ``z``
is to stored patterns. The token's equilibrium is the point where the map ``f(z) = z - grad E(z)`` changes nothing;
logits are read from ``c``, the equilibrium and what the memory holds there (``docs/math/equilibrium.md``).

The public code of this idea is no guide: there energy and map were unrelated, one state served the whole sequence, and
no gradient reached the dynamics (``docs/design/005-mamba-hopfield.md``).
"""

from dataclasses import dataclass, fields
from typing import ClassVar, final

from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.layers.equilibrium_config import EquilibriumConfig, EquilibriumSettings
from helmholtz.layers.norm import RMSNorm
from helmholtz.models.base import ModelConfig
from helmholtz.models.decoder import Decoder
from helmholtz.models.mamba import MambaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaHopfieldConfig(EquilibriumSettings, MambaConfig):
    """Sizes of the Mamba blocks, the memory, and how equilibria are found and differentiated."""

    def __post_init__(self) -> None:
        MambaConfig.__post_init__(self)
        EquilibriumSettings.__post_init__(self)

    def equilibrium_config(self) -> EquilibriumConfig:
        return EquilibriumConfig(**{f.name: getattr(self, f.name) for f in fields(EquilibriumConfig)})


@final
class MambaHopfield(Decoder):
    """Decoder of Mamba-2 blocks with an equilibrium layer before the output matrix."""

    config_class: ClassVar[type[ModelConfig]] = MambaHopfieldConfig
    config: MambaHopfieldConfig
    context_norm: RMSNorm
    equilibrium: EquilibriumLayer


def small(vocab_size: int) -> MambaHopfieldConfig:
    """Beside ``transformer.small``: 4 blocks of width 128, 256 patterns."""
    return MambaHopfieldConfig(
        vocab_size=vocab_size, d_model=128, n_layers=4, d_head=32, n_patterns=256, max_seq_len=256
    )


def medium(vocab_size: int) -> MambaHopfieldConfig:
    """6 blocks of width 512, 5,000 patterns: the size of the original's README."""
    return MambaHopfieldConfig(
        vocab_size=vocab_size, d_model=512, d_state=64, n_layers=6, n_patterns=5000, max_seq_len=1024
    )
