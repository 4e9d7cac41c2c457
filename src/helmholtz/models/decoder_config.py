"""Any combination of mixers, a latent plan and an equilibrium."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from helmholtz._checks import check, check_choice
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.mixer_config import AttentionConfig, MambaMixerConfig, is_causal
from helmholtz.models.base import ConfigT, LayerConfig, ModelConfig, PlanConfig, default_d_ff
from helmholtz.models.codec import config_from_dict
from helmholtz.models.layer_pattern import layers_of

ENCODER_PRIORS = ("softmax", "linear", "gla", "mamba")
"""Of a FEM that reads a plan's codes from the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder layer by layer, and its plan and equilibrium if it has them."""

    layers: tuple[LayerConfig, ...] | list[LayerConfig]
    """The blocks, from the first to the last."""
    plan: PlanConfig | None = None
    """A latent plan, with the parts of the Free Transformer's."""
    equilibrium: EquilibriumConfig | None = None
    """An equilibrium of every token after the last block."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        object.__setattr__(self, "layers", tuple(self.layers))
        check(len(self.layers) > 0, "layers", list(self.layers), "at least one")
        for index, layer in enumerate(self.layers):
            self._check_width(f"layers[{index}].mixer", layer.mixer)
            causal = "true: a decoder's layer lets no token see a later one"
            check(is_causal(layer.mixer), f"layers[{index}].mixer.causal", False, causal)
        if self.plan is not None:
            object.__setattr__(self, "plan", self._complete(self.plan))
        if self.equilibrium is not None:
            self._check_width("equilibrium", self.equilibrium)

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """As ``ModelConfig.from_dict``; parts that say no ``d_model`` have the model's.

        ``layers`` may also be a pattern such as ``attention, fem:gla x3, mamba`` (``layer_pattern.layers_of``), and
        an ``equilibrium`` without ``d_inner`` has twice the width, as a Mamba has.
        """
        if isinstance(values, Mapping):
            values = _with_widths(values)
        config: ConfigT = config_from_dict(cls, values, cls.__name__)
        return config

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        return tuple(self.layers)

    def plan_config(self) -> PlanConfig | None:
        return self.plan

    def equilibrium_config(self) -> EquilibriumConfig | None:
        return self.equilibrium

    def _check_width(self, name: str, part: Any) -> None:
        check(part.d_model == self.d_model, f"{name}.d_model", part.d_model, f"d_model = {self.d_model}")

    def _complete(self, plan: PlanConfig) -> PlanConfig:
        last = len(self.layers) - 1
        check(plan.layer <= last, "plan.layer", plan.layer, f"at most {last}, the last of the layers")
        if plan.encoder is None:
            plan = replace(plan, encoder=_default_encoder(self.layers[plan.layer], self.d_model))
        assert plan.encoder is not None
        mixer = plan.encoder.mixer
        self._check_width("plan.encoder.mixer", mixer)
        kinds = ("attention", "fem")
        check(
            not isinstance(mixer, MambaMixerConfig),
            "plan.encoder.mixer.kind",
            mixer.kind,
            f"one of {kinds}: the encoder reads later tokens too",
        )
        backward = "false: the encoder reads later tokens too"
        check(not is_causal(mixer), "plan.encoder.mixer.causal", True, backward)
        if isinstance(mixer, FreeEnergyMixerConfig):
            check_choice("plan.encoder.mixer.prior", mixer.prior, ENCODER_PRIORS)
        return plan


def _with_widths(given: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(given)
    width = values.get("d_model", ModelConfig.__dataclass_fields__["d_model"].default)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        return values  # which is refused later, by name
    layers = values.get("layers", ())
    check(
        isinstance(layers, str | list | tuple),
        "layers",
        layers,
        "a list, or a pattern: attention, fem:gla x3",
    )
    if isinstance(layers, str):
        layers = layers_of(layers, width)
    if "layers" in values:
        values["layers"] = [_with_width(layer, "mixer", width) for layer in layers]
    plan = values.get("plan")
    if isinstance(plan, Mapping) and plan.get("encoder") is not None:
        values["plan"] = dict(plan) | {"encoder": _with_width(plan["encoder"], "mixer", width)}
    if isinstance(values.get("equilibrium"), Mapping):
        values["equilibrium"] = {"d_model": width, "d_inner": 2 * width} | dict(values["equilibrium"])
    return values


def _with_width(values: Any, name: str, width: int) -> Any:
    """These values with ``d_model`` in the part ``name``, if it is there and lacks it."""
    if not isinstance(values, Mapping) or not isinstance(values.get(name), Mapping):
        return values
    return dict(values) | {name: {"d_model": width} | dict(values[name])}


def _default_encoder(layer: LayerConfig, d_model: int) -> LayerConfig:
    """Attention with the heads of this layer, if they fit, and its feed-forward."""
    n_heads = getattr(layer.mixer, "n_heads", 1)
    fits = d_model % n_heads == 0 and d_model // n_heads % 2 == 0  # rotary positions turn pairs
    mixer = AttentionConfig(d_model=d_model, n_heads=n_heads if fits else 1, causal=False)
    return LayerConfig(mixer=mixer, d_ff=layer.d_ff or default_d_ff(d_model))
