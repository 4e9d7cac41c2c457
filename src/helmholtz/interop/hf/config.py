"""The config that transformers saves: which architecture, its config, and what only some architectures have."""

import json
from typing import Any

from transformers import PreTrainedConfig

from helmholtz._checks import (
    check,
    check_choice,
    check_divides,
    check_integer,
    check_keys,
    check_non_negative,
)
from helmholtz.layers.mixer_config import MambaMixerConfig
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig
from helmholtz.models.checkpoint import MODEL_TYPE

PLAN_OBJECTIVE = {"kappa_bits": 0.5}
EQUILIBRIUM_OBJECTIVE = {"convergence_weight": 0.05}
"""What training minimises beside the cross-entropy, and its defaults: those of this library's own trainer."""
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    "initializer_range",
)


def _size(*names: str) -> Any:
    """A field of ``core`` as a property; the first of these that the architecture has."""
    return property(lambda self: self._get_size(*names), lambda self, value: self._set_size(value, *names))


class HelmholtzConfig(PreTrainedConfig):
    """Any model of ``MODELS`` as a config of transformers.

    Attributes:
        architecture: a key of ``MODELS``.
        core: the fields of its config, as ``ModelConfig.to_dict`` gives them; completed, so that a later change of a
            default does not change a saved model.
        objective: of a model with a plan ``kappa_bits``, bits per token that a plan carries at no charge; of one with
            an equilibrium ``convergence_weight``, the weight of the distance from start to equilibrium. None of others.
        plan_seed: of a model with a plan, the seed of its plans: the code of a token is a function of this and of the
            token's position alone. None means 0.
        prompt_plan: of a model with a plan, who plans a prompt that is read into an empty cache: "prior", or
            "posterior", the encoder. None means "prior".
        use_cache: whether a call starts a stream if it does not say.

    Sizes have their usual names too: ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``
    (of the first block; of Mamba groups of channels with one decay), ``num_key_value_heads``, ``intermediate_size`` (of
    Mamba the channels of a mixer), ``max_position_embeddings``, ``rms_norm_eps``, ``tie_word_embeddings``,
    ``initializer_range`` (None: weights start by their fan-in). Setting one changes ``core``.

    Raises: ValueError for an unknown architecture or key, and for a setting that the architecture does not have.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    architecture: str = ""
    core: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    plan_seed: int | None = None
    prompt_plan: str | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_choice("architecture", self.architecture, MODELS)
        check(self.core is not None, "core", self.core, "the fields of the architecture's config")
        assert self.core is not None
        self.core = self._completed(self.core)
        self._complete_objective()
        self._complete_plan()
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, architecture: str, core: ModelConfig) -> "HelmholtzConfig":
        """The config of a model of this library."""
        return cls(architecture=architecture, core=core.to_dict())

    def core_config(self) -> ModelConfig:
        """The config of the model inside."""
        assert self.core is not None
        return MODELS[self.architecture].config_class.from_dict(self.core)

    def _complete_objective(self) -> None:
        config = self.core_config()
        known = PLAN_OBJECTIVE if config.plan_config() else {}
        known = known | (EQUILIBRIUM_OBJECTIVE if config.equilibrium_config() else {})
        if not known:
            absent = f"None for {self.architecture}: it has neither a plan nor an equilibrium"
            check(self.objective is None, "objective", self.objective, absent)
            return
        check_keys("objective", self.objective or {}, known)
        self.objective = known | (self.objective or {})
        for name, value in self.objective.items():
            check_non_negative(f"objective.{name}", value)

    def _complete_plan(self) -> None:
        if self.core_config().plan_config() is None:
            for name in ("plan_seed", "prompt_plan"):
                wanted = f"None for {self.architecture}: it has no plan"
                check(getattr(self, name) is None, name, getattr(self, name), wanted)
            return
        self.plan_seed = 0 if self.plan_seed is None else self.plan_seed
        self.prompt_plan = "prior" if self.prompt_plan is None else self.prompt_plan
        check_integer("plan_seed", self.plan_seed, minimum=0)
        check_choice("prompt_plan", self.prompt_plan, ("prior", "posterior"))

    def to_dict(self) -> dict[str, Any]:
        """With the sizes by their usual names, which others look up here; the file has them in ``core`` alone."""
        return super().to_dict() | {name: getattr(self, name) for name in SIZES if hasattr(self, name)}

    def to_diff_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_diff_dict().items() if name not in SIZES}

    def _get_size(self, *names: str) -> Any:
        """The first of these fields that the architecture's config has."""
        assert self.core is not None
        for name in names:
            if name in self.core:
                return self.core[name]
        raise AttributeError(f"a {self.architecture} has none of {', '.join(names)}")

    def _set_size(self, value: Any, *names: str) -> None:
        assert self.core is not None
        name = next((name for name in names if name in self.core), None)
        if name is None:
            raise ValueError(f"a {self.architecture} has none of {', '.join(names)}")
        self.core = self._completed(self.core | {name: value})

    def _completed(self, core: dict[str, Any]) -> dict[str, Any]:
        # as JSON gives it back: tuples are lists
        config = MODELS[self.architecture].config_class.from_dict(core)
        return json.loads(json.dumps(config.to_dict()))

    vocab_size = _size("vocab_size")
    hidden_size = _size("d_model")
    num_key_value_heads = _size("n_kv_heads", "n_heads")
    intermediate_size = _size("d_ff", "d_inner")
    max_position_embeddings = _size("max_seq_len")
    rms_norm_eps = _size("norm_eps")
    tie_word_embeddings = _size("tie_embeddings")

    @property
    def initializer_range(self) -> float | None:
        assert self.core is not None
        return self.core.get("initializer_range")

    @initializer_range.setter
    def initializer_range(self, value: float | None) -> None:
        assert self.core is not None
        self.core = self._completed(self.core | {"initializer_range": value})

    @property
    def num_hidden_layers(self) -> int:
        return len(self.core_config().layer_configs())

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if value != self.num_hidden_layers:
            self._set_size(value, "n_layers")

    @property
    def num_attention_heads(self) -> int:
        mixer = self.core_config().layer_configs()[0].mixer
        if isinstance(mixer, MambaMixerConfig):
            assert mixer.d_inner is not None
            return mixer.d_inner // mixer.d_head
        return getattr(mixer, "n_heads", 1)

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        assert self.core is not None
        if value == self.num_attention_heads:
            return None
        if "n_heads" in self.core or "d_head" not in self.core:
            return self._set_size(value, "n_heads")
        channels = self._get_size("d_inner")
        check_divides("num_attention_heads", value, "d_inner", channels)
        return self._set_size(channels // value, "d_head")
