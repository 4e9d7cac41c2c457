"""Free-energy networks in PyTorch."""

from helmholtz.layers import (
    Attention,
    FreeEnergyMixer,
    FreeEnergyMixerConfig,
    HopfieldMemory,
    fem_widths,
    inspect_read,
    matched_d_ff,
)
from helmholtz.models import FEMLM, MODELS, Decoder, FreeTransformer, Mamba, MambaHopfield, Transformer
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformerConfig
from helmholtz.models.generation import SamplingSettings, generate, generate_planned
from helmholtz.models.mamba import MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfieldConfig
from helmholtz.models.planning import PlanSettings
from helmholtz.models.transformer import TransformerConfig
from helmholtz.solvers import SolverConfig

__version__ = "0.1.0"

__all__ = [
    "FEMLM",
    "MODELS",
    "Attention",
    "FEMLMConfig",
    "FreeEnergyMixer",
    "FreeEnergyMixerConfig",
    "Decoder",
    "DecoderConfig",
    "FreeTransformer",
    "FreeTransformerConfig",
    "HopfieldMemory",
    "Mamba",
    "MambaConfig",
    "MambaHopfield",
    "MambaHopfieldConfig",
    "PlanSettings",
    "SamplingSettings",
    "SolverConfig",
    "Transformer",
    "TransformerConfig",
    "fem_widths",
    "generate",
    "generate_planned",
    "inspect_read",
    "load_checkpoint",
    "matched_d_ff",
    "save_checkpoint",
]
