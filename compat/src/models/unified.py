"""The original ``src.models.unified``."""

from helmholtz.interop.seeds.unified.config import UnifiedModelConfig
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ, UnifiedModel

__all__ = ["UnifiedMambaHopfieldDEQ", "UnifiedModel", "UnifiedModelConfig"]
