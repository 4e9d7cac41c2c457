"""The settings of the original, in its names and its YAML layout."""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from helmholtz._checks import (
    check,
    check_fraction,
    check_integer,
    check_keys,
    check_non_negative,
    check_positive,
)
from helmholtz.models.free_transformer import FreeTransformerConfig
from helmholtz.models.transformer import TransformerConfig

ConfigT = TypeVar("ConfigT")
SECTIONS = ("model", "training", "data")


@dataclass
class ModelConfig:
    """Sizes of a model, in the original names. Mutable: checked when a model is built from it."""

    vocab_size: int = 32000
    hidden_dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    """Key/value heads of every block, the encoder's included; None means ``num_heads``."""
    ffn_hidden_dim: int | None = None
    """Width of the feed-forward; None means 8/3 ``hidden_dim`` (the original: 11008, whatever the width)."""
    max_seq_len: int = 2048
    latent_dim: int = 16
    """Bits of the plan per token, 1 to 16."""
    split_layer: int | None = None
    """Blocks below the plan; None means half of them."""
    use_rmsnorm: bool = True
    use_rope: bool = True
    use_swiglu: bool = True
    dropout: float = 0.0
    """Probability to drop what a block writes into the residual stream."""
    attention_dropout: float = 0.0

    def to_core(self) -> FreeTransformerConfig:
        """The same model in the library's own names.

        Raises: ValueError for a wrong value, or an option that nothing here would honour.
        """
        _check_honoured(self)
        return FreeTransformerConfig(
            **self._sizes(), n_latent_bits=self.latent_dim, split_layer=self.split_layer
        )

    def to_baseline(self) -> TransformerConfig:
        """The decoder of these sizes without a plan; raises as ``to_core``."""
        _check_honoured(self)
        return TransformerConfig(**self._sizes())

    def _sizes(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_dim,
            "n_layers": self.num_layers,
            "n_heads": self.num_heads,
            "n_kv_heads": self.num_kv_heads,
            "d_ff": self.ffn_hidden_dim,
            "max_seq_len": self.max_seq_len,
            "dropout": self.dropout,
        }


def _check_honoured(config: ModelConfig) -> None:
    for name, reason in {
        "use_rmsnorm": "no other norm was ever built",
        "use_swiglu": "no other feed-forward was ever built",
        "use_rope": "without rotary positions the encoder cannot tell tokens apart",
    }.items():
        check(getattr(config, name) is True, name, getattr(config, name), f"True: {reason}")
    value = config.attention_dropout
    check(value == 0, "attention_dropout", value, "0: dropped weights are no distribution; set dropout")


@dataclass
class TrainingConfig:
    """How the original trains, in its names. One process on one device: what asks for more is refused."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    warmup_steps: int = 2000
    max_steps: int = 100000
    beta_kl: float = 1.0
    """Weight of the hinge; the paper's objective has 1."""
    kappa_free_bits: float = 0.3466
    """What a token may carry at no charge, in nats: half a bit."""
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    use_fsdp: bool = False
    use_deepspeed: bool = False
    fsdp_config: dict[str, Any] = field(default_factory=dict)
    deepspeed_config: dict[str, Any] = field(default_factory=dict)
    save_every: int = 5000
    eval_every: int = 1000
    checkpoint_dir: str = "./checkpoints"
    log_every: int = 100
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps"):
            check_integer(name, getattr(self, name))
        for name in ("save_every", "eval_every", "log_every"):
            check_integer(name, getattr(self, name))
        check_integer("warmup_steps", self.warmup_steps, minimum=0)
        wanted = f"below max_steps = {self.max_steps}"
        check(self.warmup_steps < self.max_steps, "warmup_steps", self.warmup_steps, wanted)
        for name in ("learning_rate", "grad_clip"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "beta_kl", "kappa_free_bits"):
            check_non_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            check_fraction(name, getattr(self, name))
        for name in ("use_deepspeed", "fsdp_config", "deepspeed_config", "wandb_project"):
            value = getattr(self, name)
            check(not value, name, value, "left unset: nothing here would honour it")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "TrainingConfig":
        """The section ``training`` of a file with the sections model, training and data, or a file of these alone.

        Raises: ValueError naming an unknown section or key.
        """
        values = read_yaml(path)
        if values.keys() & set(SECTIONS):
            values = section(values, "training")
        return build(cls, values, "training")

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the section ``training``, which ``from_yaml`` reads back to an equal config."""
        Path(path).write_text(yaml.safe_dump({"training": asdict(self)}, sort_keys=False))


@dataclass
class DataConfig:
    """The synthetic data, in the original names: sizes and seed of what ``SyntheticDataGenerator`` draws."""

    dataset_name: str = "synthetic"
    tokenizer_name: str | None = None
    """None: ids are drawn as they are (the original names "gpt2" and uses nothing)."""
    max_length: int | None = None
    """None: ``synthetic_seq_length`` (the original names 2048 and uses nothing)."""
    synthetic_vocab_size: int = 10000
    synthetic_seq_length: int = 512
    num_train_samples: int = 50000
    num_val_samples: int = 5000
    seed: int = 42

    def __post_init__(self) -> None:
        check(self.dataset_name == "synthetic", "dataset_name", self.dataset_name, "'synthetic'")
        check(self.tokenizer_name is None, "tokenizer_name", self.tokenizer_name, "None for synthetic data")
        check(
            self.max_length is None, "max_length", self.max_length, "None: rows have synthetic_seq_length ids"
        )
        for name in ("synthetic_vocab_size", "synthetic_seq_length", "num_train_samples", "num_val_samples"):
            check_integer(name, getattr(self, name))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ValueError naming the file if there is none."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{os.fspath(path)}: no readable YAML ({error})") from error
    check(isinstance(values, dict), os.fspath(path), values, "a mapping of names to values")
    return dict(values)


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """One section of the original's layout, empty if it is not there. Raises: ValueError for unknown sections."""
    check_keys("the file", values, SECTIONS)
    found = values.get(name) or {}
    check(isinstance(found, dict), name, found, "a mapping of names to values")
    return dict(found)


def build(cls: type[ConfigT], values: dict[str, Any], name: str) -> ConfigT:
    """A config from a section. Raises: ValueError for an unknown key, naming the nearest one."""
    check_keys(name, values, [f.name for f in fields(cls)])  # type: ignore[arg-type]
    return cls(**values)
