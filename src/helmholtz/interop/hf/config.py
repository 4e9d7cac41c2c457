"""The config that transformers saves: which architecture, its config, and what only some architectures have."""

import json
from typing import Any

from transformers import PreTrainedConfig

from helmholtz._checks import check, check_choice, check_integer, check_keys, check_non_negative
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig

MODEL_TYPE = "helmholtz"
OBJECTIVES: dict[str, dict[str, float]] = {
    "free_transformer": {"kappa_bits": 0.5},
    "mamba_hopfield": {"convergence_weight": 0.05},
}
"""What training minimises beside the cross-entropy, and its defaults: those of this library's own trainer."""
PLANNED = "free_transformer"


class HelmholtzConfig(PreTrainedConfig):
    """Any model of ``MODELS`` as a config of transformers.

    Attributes:
        architecture: a key of ``MODELS``.
        core: the fields of its config, as ``ModelConfig.to_dict`` gives them; completed, so that a later change of a
            default does not change a saved model.
        objective: of a free_transformer ``{"kappa_bits": ...}``, bits per token that a plan carries at no charge; of a
            mamba_hopfield ``{"convergence_weight": ...}``, the weight of the distance from start to equilibrium. Others
            have none.
        plan_seed: of a free_transformer, the seed of its plans: the code of a token is a function of this and of the
            token's position alone. None means 0.
        prompt_plan: of a free_transformer, who plans a prompt that is read into an empty cache: "prior", or
            "posterior", the encoder. None means "prior".

    Sizes have their usual names too (``vocab_size``, ``hidden_size``, ...), read-only.

    Raises: ValueError for an unknown architecture or key, and for a setting that the architecture does not have.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    architecture: str = ""
    core: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    plan_seed: int | None = None
    prompt_plan: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_choice("architecture", self.architecture, MODELS)
        check(self.core is not None, "core", self.core, "the fields of the architecture's config")
        # as JSON gives it back: tuples are lists
        self.core = json.loads(json.dumps(self.core_config().to_dict()))
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
        known = OBJECTIVES.get(self.architecture)
        if known is None:
            check(self.objective is None, "objective", self.objective, f"None for {self.architecture}")
            return
        check_keys("objective", self.objective or {}, known)
        self.objective = known | (self.objective or {})
        for name, value in self.objective.items():
            check_non_negative(f"objective.{name}", value)

    def _complete_plan(self) -> None:
        if self.architecture != PLANNED:
            for name in ("plan_seed", "prompt_plan"):
                wanted = f"None for {self.architecture}: only a {PLANNED} has plans"
                check(getattr(self, name) is None, name, getattr(self, name), wanted)
            return
        self.plan_seed = 0 if self.plan_seed is None else self.plan_seed
        self.prompt_plan = "prior" if self.prompt_plan is None else self.prompt_plan
        check_integer("plan_seed", self.plan_seed, minimum=0)
        check_choice("prompt_plan", self.prompt_plan, ("prior", "posterior"))

    def _core(self, name: str) -> Any:
        assert self.core is not None
        return self.core[name]

    @property
    def vocab_size(self) -> int:
        return self._core("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self._core("d_model")

    @property
    def num_hidden_layers(self) -> int:
        return self._core("n_layers")

    @property
    def max_position_embeddings(self) -> int:
        return self._core("max_seq_len")

    @property
    def tie_word_embeddings(self) -> bool:
        return self._core("tie_embeddings")
