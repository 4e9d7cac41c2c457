"""Modules with parameters and state."""

from helmholtz.layers.attention import Attention
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.block import Block
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.state import KVCache, map_state

__all__ = ["AbstractMixer", "Attention", "Block", "KVCache", "SwiGLU", "map_state"]
