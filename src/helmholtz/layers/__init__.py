"""Modules with parameters and state."""

from helmholtz.layers.attention import Attention
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.block import Block
from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer, TokenProblem
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem import FreeEnergyMixer, MixerState
from helmholtz.layers.fem_config import FreeEnergyMixerConfig, fem_widths
from helmholtz.layers.fem_reading import Reading, inspect_read, read_statistics
from helmholtz.layers.free_energy_attention import FreeEnergyAttention
from helmholtz.layers.free_energy_gate import FreeEnergyGate
from helmholtz.layers.hopfield import HopfieldMemory, MarginWarning, NoveltyWarning, WriteResult
from helmholtz.layers.key_value_memory import KeyValueMemory, NGramKeys
from helmholtz.layers.mamba import MambaCell, MambaMixer, MambaState
from helmholtz.layers.mixer_config import AbstractMixerConfig
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sizing import matched_d_ff
from helmholtz.layers.state import KVCache, map_state

__all__ = [
    "AbstractMixer",
    "AbstractMixerConfig",
    "Attention",
    "Block",
    "Equilibrium",
    "EquilibriumConfig",
    "EquilibriumLayer",
    "FreeEnergyAttention",
    "FreeEnergyGate",
    "FreeEnergyMixer",
    "FreeEnergyMixerConfig",
    "HopfieldMemory",
    "KVCache",
    "KeyValueMemory",
    "MambaCell",
    "MambaMixer",
    "MambaState",
    "MarginWarning",
    "NoveltyWarning",
    "WriteResult",
    "MixerState",
    "NGramKeys",
    "Reading",
    "SwiGLU",
    "TokenProblem",
    "fem_widths",
    "inspect_read",
    "map_state",
    "matched_d_ff",
    "read_statistics",
]
