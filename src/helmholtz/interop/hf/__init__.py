"""The models in Hugging Face's transformers: one config and one model class for every architecture of ``MODELS``.

``register()`` makes ``AutoConfig`` and ``AutoModelForCausalLM`` know them; nothing is registered by importing.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("transformers") is None:
    raise ImportError("helmholtz.interop.hf needs the package transformers: pip install 'helmholtz-nn[hf]'")

from helmholtz.interop.hf.cache import StateCache
from helmholtz.interop.hf.config import HelmholtzConfig
from helmholtz.interop.hf.export import export, from_hf
from helmholtz.interop.hf.free_energy import load_free_energy, remove_free_energy, use_free_energy
from helmholtz.interop.hf.model import HelmholtzForCausalLM, register
from helmholtz.interop.hf.tokenizer import to_transformers
from helmholtz.models.checkpoint import MODEL_TYPE

if TYPE_CHECKING:
    from helmholtz.interop.hf.trainer import HelmholtzTrainer

__all__ = [
    "MODEL_TYPE",
    "HelmholtzConfig",
    "HelmholtzForCausalLM",
    "HelmholtzTrainer",
    "StateCache",
    "export",
    "from_hf",
    "load_free_energy",
    "register",
    "remove_free_energy",
    "to_transformers",
    "use_free_energy",
]


def __getattr__(name: str) -> Any:
    """``HelmholtzTrainer`` on demand: transformers' Trainer takes seconds to import."""
    if name != "HelmholtzTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from helmholtz.interop.hf.trainer import HelmholtzTrainer

    return HelmholtzTrainer
