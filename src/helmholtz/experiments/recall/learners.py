"""The small decoders that the memory studies train, and what these studies share."""

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from helmholtz._checks import check_choice
from helmholtz.experiments.base import Study
from helmholtz.models.decoder import Decoder
from helmholtz.models.mamba import Mamba, MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.models.transformer import Transformer, TransformerConfig

LEARNERS = ("transformer", "mamba", "mamba_hopfield")
D_MODEL, N_LAYERS, N_PATTERNS = 64, 2, 64


def build_learner(name: str, *, vocab_size: int, n_tokens: int, seed: int) -> Decoder:
    """A decoder for sequences of at most ``n_tokens``, its weights drawn by the seed (torch's global one is set)."""
    check_choice("learner", name, LEARNERS)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": D_MODEL,
        "n_layers": N_LAYERS,
        "max_seq_len": n_tokens,
    }
    if name == "transformer":
        return Transformer(TransformerConfig(**sizes, n_heads=2))
    if name == "mamba":
        return Mamba(MambaConfig(**sizes))
    return MambaHopfield(MambaHopfieldConfig(**sizes, n_patterns=N_PATTERNS))


class LearnerStudy(Study):
    """A study with a decoder of one's choice, whose ``run`` ends with the report."""

    reported = ("run", "report")
    learner: ClassVar[str]
    """The decoder unless ``--learner`` names another."""

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        check_choice("learner", values["learner"], LEARNERS)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        text = f"the decoder: one of {', '.join(LEARNERS)}"
        parser.add_argument("--learner", type=str, default=cls.learner, help=text)
