"""The language model of the Free Energy Mixer.

The baseline decoder with every attention layer replaced by a ``FreeEnergyMixer``; each layer may read from another
prior (a hybrid). The feed-forward takes up what the mixers use more or less than attention, so that a model has the
parameters of the baseline of equal ``d_model``, ``n_layers``, ``n_heads`` and ``n_kv_heads``: within 2 %, or 2 columns
of the feed-forwards in a narrow model. The paper matches by the widths of the mixer alone and leaves its local
conditioning on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, final

from helmholtz._checks import check_integer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig, MixerOptions, Prior
from helmholtz.layers.sizing import matched_d_ff
from helmholtz.models.base import AttentionModelConfig, LayerConfig, ModelConfig
from helmholtz.models.decoder import Decoder

_USED_BY: dict[str, tuple[str, ...]] = {
    "d_head": ("softmax", "linear", "gla"),
    "decay": ("gla",),
    "d_state": ("mamba",),
    "normalize": ("mamba",),
    "flash_attn": ("softmax",),
    "fla": ("linear", "gla"),
}
"""Options, and values of ``backend``, that only some priors have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FEMLMConfig(AttentionModelConfig):
    """Sizes of the FEM decoder; with ``d_ff`` None its feed-forward is as wide as the baseline's parameters allow."""

    prior: Prior | tuple[Prior, ...] | list[Prior] = "softmax"
    """One prior for all layers, or one per layer."""
    mixer: MixerOptions = MixerOptions()
    """Options of the mixers."""

    def __post_init__(self) -> None:
        check_integer("n_layers", self.n_layers)
        self._fill("n_kv_heads", self.n_heads)
        if isinstance(self.prior, list):
            object.__setattr__(self, "prior", tuple(self.prior))
        if len(self.layer_priors) != self.n_layers:
            raise ValueError(f"prior: {len(self.layer_priors)} names for n_layers={self.n_layers} layers")
        self._refuse_unused()
        built = {prior: self.mixer_config(prior) for prior in self.layer_priors}
        object.__setattr__(self, "mixer", _completed(self.mixer, list(built.values())))
        AttentionModelConfig.__post_init__(self)

    @property
    def layer_priors(self) -> tuple[Prior, ...]:
        """The prior of each layer."""
        return (self.prior,) * self.n_layers if isinstance(self.prior, str) else tuple(self.prior)

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        layers = {
            prior: LayerConfig(mixer=self.mixer_config(prior), d_ff=self.d_ff) for prior in self.layer_priors
        }
        return tuple(layers[prior] for prior in self.layer_priors)

    def mixer_config(self, prior: Prior) -> FreeEnergyMixerConfig:
        """The config of the layers that read from ``prior``."""
        unused = {name for name, priors in _USED_BY.items() if prior not in priors}
        if self.mixer.backend in unused:
            unused.add("backend")
        used = [field.name for field in fields(MixerOptions) if field.name not in unused]
        return FreeEnergyMixerConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads if prior == "softmax" else self.n_heads,
            prior=prior,
            rope_theta=None if prior == "mamba" else self.rope_theta,
            **{name: getattr(self.mixer, name) for name in used},
        )

    def _refuse_unused(self) -> None:
        """Raise for an option that none of the layers has."""
        o, priors = self.mixer, set(self.layer_priors)
        given = {
            "d_head": o.d_head is not None,
            "decay": o.decay is not None,
            "d_state": o.d_state is not None,
            "normalize": not o.normalize,
            o.backend: o.backend in _USED_BY,
        }
        for name, is_given in given.items():
            if is_given and not priors & set(_USED_BY[name]):
                label = f"mixer.{name}" if hasattr(o, name) else f"mixer.backend={name!r}"
                raise ValueError(
                    f"{label} acts on {', '.join(_USED_BY[name])} layers; prior is {self.prior!r}"
                )
        if self.n_kv_heads != self.n_heads and "softmax" not in priors:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} acts on softmax layers; prior is {self.prior!r}")

    def _derived_d_ff(self) -> int:
        """One width for all layers, so that all blocks together match those of the baseline."""
        mixers = map(self.mixer_config, self.layer_priors)
        return matched_d_ff(*mixers, d_ff=AttentionModelConfig._derived_d_ff(self))


def _completed(options: MixerOptions, built: Sequence[FreeEnergyMixerConfig]) -> MixerOptions:
    """The options with the defaults that the layers' configs have chosen."""

    def chosen(name: str) -> Any:
        users = _USED_BY.get(name)
        return next((getattr(c, name) for c in built if users is None or c.prior in users), None)

    names = ("d_head", "d_head_v", "tdc_width", "decay", "d_state")
    return replace(options, **{name: chosen(name) for name in names})


@final
class FEMLM(Decoder):
    """Decoder of Free Energy Mixer blocks (Lu & Yang, "Free Energy Mixer", 2026)."""

    config_class: ClassVar[type[ModelConfig]] = FEMLMConfig
    config: FEMLMConfig


def small(vocab_size: int, prior: Prior | tuple[Prior, ...] = "softmax") -> FEMLMConfig:
    """The FEM of ``transformer.small``: about 0.8 M parameters beside the embedding."""
    return FEMLMConfig(
        vocab_size=vocab_size, prior=prior, d_model=128, n_layers=4, n_heads=4, max_seq_len=256
    )


def medium(vocab_size: int, prior: Prior | tuple[Prior, ...] = "softmax") -> FEMLMConfig:
    """The FEM of ``transformer.medium``: about 25 M parameters beside the embedding."""
    return FEMLMConfig(
        vocab_size=vocab_size, prior=prior, d_model=512, n_layers=8, n_heads=8, max_seq_len=1024
    )
