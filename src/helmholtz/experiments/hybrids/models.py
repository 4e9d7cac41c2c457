"""The models of the study: stacks of one mixer, with a plan or an equilibrium, at equal parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from helmholtz.experiments.letters.data import ALPHABET
from helmholtz.experiments.letters.run import LetterExperiment
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem_config import FreeEnergyMixerConfig, Prior
from helmholtz.layers.mixer_config import AttentionConfig, MambaMixerConfig
from helmholtz.layers.sizing import matched_d_ff
from helmholtz.models.base import LayerConfig, PlanConfig, default_d_ff
from helmholtz.models.decoder_config import DecoderConfig

PlannedMixer = Literal["attention", "fem"]
"""Of a decoder with a plan, its encoder included; FEM over the softmax prior."""
Part = Literal["plan", "equilibrium"]
Sizes = dict[str, Any]
"""``vocab_size``, ``d_model``, ``max_seq_len``."""
N_HEADS, N_BLOCKS = 4, 4
WIDTH, N_BITS = 128, 8
"""Of the models of text, as in the demo."""
PLAIN_D_FF, PLANNED_D_FF, SETTLED_D_FF = 344, 224, 212
"""Of attention's feed-forward: alone and beside a plan as in the demo, and with what an equilibrium leaves of it."""


def _attention(d_model: int, d_ff: int, *, causal: bool = True) -> LayerConfig:
    mixer = AttentionConfig(d_model=d_model, n_heads=N_HEADS, causal=causal)
    return LayerConfig(mixer=mixer, d_ff=d_ff)


def _fem(prior: Prior, d_model: int, d_ff: int, *, causal: bool = True) -> LayerConfig:
    """A block with the parameters of an attention block whose feed-forward is as wide as ``d_ff``."""
    mixer = FreeEnergyMixerConfig(d_model=d_model, n_heads=N_HEADS, prior=prior, causal=causal)
    return LayerConfig(mixer=mixer, d_ff=matched_d_ff(mixer, d_ff=d_ff))


def _with_plan(mixer: PlannedMixer, d_ff: int, n_bits: int | None, sizes: Sizes) -> DecoderConfig:
    """A Free Transformer of a mixer: the plan enters the third of four blocks. None: the decoder without a plan."""

    def block(*, causal: bool) -> LayerConfig:
        if mixer == "attention":
            return _attention(sizes["d_model"], d_ff, causal=causal)
        return _fem("softmax", sizes["d_model"], d_ff, causal=causal)

    plan = None
    if n_bits is not None:
        plan = PlanConfig(layer=N_BLOCKS // 2, n_bits=n_bits, encoder=block(causal=False))
    return DecoderConfig(**sizes, layers=(block(causal=True),) * N_BLOCKS, plan=plan)


def letter_model(mixer: PlannedMixer, experiment: LetterExperiment, *, planned: bool) -> DecoderConfig:
    """With attention the model of ``LetterExperiment.build``, and FEM at its parameters."""
    sizes = {
        "vocab_size": len(ALPHABET),
        "d_model": experiment.d_model,
        "max_seq_len": experiment.law.n_tokens,
        "tie_embeddings": experiment.tie_embeddings,
    }
    n_bits = experiment.n_latent_bits if planned else None
    return _with_plan(mixer, default_d_ff(experiment.d_model), n_bits, sizes)


def _planned_text(mixer: PlannedMixer, *, planned: bool) -> Callable[[Sizes], DecoderConfig]:
    d_ff, n_bits = (PLANNED_D_FF, N_BITS) if planned else (PLAIN_D_FF, None)
    return lambda sizes: _with_plan(mixer, d_ff, n_bits, sizes)


def _gla(d_ff: int, *, equilibrium: bool = False) -> Callable[[Sizes], DecoderConfig]:
    layers = (_fem("gla", WIDTH, d_ff),) * N_BLOCKS
    return lambda sizes: DecoderConfig(**sizes, layers=layers, equilibrium=_equilibrium(equilibrium))


def _mamba(
    n_layers: int, *, d_inner: int, d_state: int, equilibrium: bool = False
) -> Callable[[Sizes], DecoderConfig]:
    mixer = MambaMixerConfig(d_model=WIDTH, d_inner=d_inner, d_state=d_state, d_head=96)
    layers = (LayerConfig(mixer=mixer),) * n_layers
    return lambda sizes: DecoderConfig(**sizes, layers=layers, equilibrium=_equilibrium(equilibrium))


def _equilibrium(wanted: bool) -> EquilibriumConfig | None:
    """That of ``configs/demo/mamba_hopfield.yaml``."""
    if not wanted:
        return None
    return EquilibriumConfig(d_model=WIDTH, d_inner=288, d_state=16, d_head=96, n_patterns=192)


@dataclass(frozen=True, slots=True)
class TextModel:
    """A row of the study on Shakespeare."""

    label: str
    part: Part
    """Which of the two questions it belongs to, and is trained like."""
    make: Callable[[Sizes], DecoderConfig]

    def config(self, *, vocab_size: int, max_seq_len: int) -> DecoderConfig:
        return self.make({"vocab_size": vocab_size, "d_model": WIDTH, "max_seq_len": max_seq_len})


TEXT_MODELS = {
    "attention": TextModel("attention", "plan", _planned_text("attention", planned=False)),
    "fem": TextModel("FEM, softmax prior", "plan", _planned_text("fem", planned=False)),
    "attention_plan": TextModel("attention and a plan", "plan", _planned_text("attention", planned=True)),
    "fem_plan": TextModel("FEM and a plan", "plan", _planned_text("fem", planned=True)),
    "mamba": TextModel("Mamba", "equilibrium", _mamba(4, d_inner=480, d_state=36)),
    "gla": TextModel("FEM, GLA prior", "equilibrium", _gla(PLAIN_D_FF)),
    "mamba_equilibrium": TextModel(
        "Mamba and an equilibrium", "equilibrium", _mamba(5, d_inner=288, d_state=16, equilibrium=True)
    ),
    "gla_equilibrium": TextModel(
        "FEM-GLA and an equilibrium", "equilibrium", _gla(SETTLED_D_FF, equilibrium=True)
    ),
    "mamba_without": TextModel("its Mamba blocks alone", "equilibrium", _mamba(5, d_inner=288, d_state=16)),
    "gla_without": TextModel("its FEM-GLA blocks alone", "equilibrium", _gla(SETTLED_D_FF)),
}
"""All have the parameters of the demo's models within a percent but the last two, the blocks of the two above them."""
FEWER = ("mamba_without", "gla_without")
"""Models that have fewer parameters than the rest."""
CONTROLS = ("attention", "fem", *FEWER)
"""What the other models are to be seen beside."""
