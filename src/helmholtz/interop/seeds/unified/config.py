"""Sizes and solver settings in the original names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from helmholtz._checks import check, check_keys
from helmholtz.models.mamba_hopfield import MambaHopfieldConfig
from helmholtz.solvers import SolverConfig

SolverType = Literal["alternating", "simultaneous", "cascade"]

TRAINING_KEYS = ("learning_rate", "batch_size", "gradient_clip")
"""Keys of the README's config that describe training: ``UnifiedModelTrainer.from_config`` reads them."""

_GONE = {
    "alpha": "the equilibrium is where the energy's gradient vanishes, so nothing is left to weigh it against",
    "lambda_l2": "the energy holds |z|^2 / 2, with which its minima are the fixed points",
    "lambda_smooth": "the energy that is reported is the one that is descended",
    "tolerance": "give tol_fixedpoint and tol_energy",
}
"""Keys of the original code that have no meaning here, and why."""


@dataclass(slots=True, kw_only=True)
class UnifiedModelConfig:
    """What a ``UnifiedMambaHopfieldDEQ`` is built from. Mutable: checked when a model is built."""

    vocab_size: int
    d_model: int = 512
    """Width of the residual stream and of the equilibrium; a multiple of 16."""
    d_state: int = 64
    """States per channel of the Mamba layers."""
    d_conv: int = 4
    """Width of their convolution."""
    n_layers: int = 6
    memory_size: int = 1024
    """Learned patterns."""
    n_slots: int = 0
    """Writable patterns beside the learned ones; the original writes over the learned ones."""
    beta: float = 2.0
    """Inverse temperature of the retrieval."""
    stability: Literal["contractive", "descent"] = "contractive"
    """One equilibrium per token, certified; or several, descended to."""
    solver_type: SolverType = "alternating"
    max_iterations: int = 30
    tol_fixedpoint: float = 1e-3
    tol_energy: float = 1e-3
    max_seq_len: int = 1_048_576
    """Longest sequence, in real tokens."""

    def to_core(self) -> MambaHopfieldConfig:
        """The same model in the library's own names."""
        return MambaHopfieldConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            d_state=self.d_state,
            d_conv=self.d_conv,
            d_head=_head_width(self.d_model),
            n_patterns=self.memory_size,
            n_slots=self.n_slots,
            beta=self.beta,
            stability=self.stability,
            max_seq_len=self.max_seq_len,
            solver=SolverConfig(
                mode=self.solver_type,
                max_steps=self.max_iterations,
                rtol=self.tol_fixedpoint,
                energy_rtol=self.tol_energy,
            ),
        )


def _head_width(d_model: int) -> int:
    """The widest head of at most 64 channels that divides the width."""
    return next(width for width in range(min(64, d_model), 0, -1) if d_model % width == 0)


def model_config(
    values: Mapping[str, Any] | UnifiedModelConfig, vocab_size: int | None
) -> UnifiedModelConfig:
    """The config with these values; the training keys of the README's dictionary are left to the trainer.

    Raises: ValueError for an unknown key, for one of the original that means nothing here, or without a vocabulary.
    """
    if isinstance(values, UnifiedModelConfig):
        own = values.vocab_size
        check(vocab_size in (None, own), "vocab_size", vocab_size, f"the config's {own}")
        return values
    names = [field.name for field in fields(UnifiedModelConfig)]
    for name in values.keys() & _GONE.keys():
        raise ValueError(f"config: {name!r} has no meaning here: {_GONE[name]}")
    check_keys("config", values, [*names, *TRAINING_KEYS])
    kept = {name: value for name, value in values.items() if name in names}
    if vocab_size is not None:
        kept["vocab_size"] = vocab_size
    check("vocab_size" in kept, "vocab_size", None, "given: in the config, or beside it")
    return UnifiedModelConfig(**kept)
