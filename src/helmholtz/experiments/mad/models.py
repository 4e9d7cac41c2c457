"""The models of the MAD study: attention, the Free Energy Mixer and its ablation, Mamba, Mamba-Hopfield.

All have the parameters of the attention row, within half a percent: the SwiGLUs take up what a mixer uses more or less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.experiments.mad.blocks import autoencoder, language_model
from helmholtz.experiments.mad.data import AbstractMadTask, Compression
from helmholtz.layers.attention import check_heads
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem_config import FreeEnergyMixerConfig, Prior, Read
from helmholtz.layers.mixer_config import AttentionConfig, MambaMixerConfig, MixerConfig
from helmholtz.layers.sizing import count_parameters, matched_size
from helmholtz.models.base import LayerConfig
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig

Initialization = Literal["fan_in", "normal_0.02"]
"""How weights start: all by their fan-in (``layers.init``); or, as in the published code, at N(0, 0.02) but for the
linear maps of attention, SwiGLU and head in the language model, which torch draws by fan-in."""
NORM_EPS = 1e-5
D_FF_STEP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MadSizes:
    """Sizes of the models; the defaults are the published ones."""

    d_model: int = 128
    n_blocks: int = 2
    n_heads: int = 16
    """Heads of attention and of the Free Energy Mixer; those with a linear prior have half as many, as published."""
    d_ff: int = 352
    """Width of the SwiGLU beside attention."""
    d_state: int = 4
    """States per channel of Mamba."""
    n_patterns: int = 64
    """Patterns of Mamba-Hopfield."""

    def __post_init__(self) -> None:
        for name in ("n_blocks", "d_ff", "d_state", "n_patterns"):
            check_integer(name, getattr(self, name))
        check_heads(self.d_model, self.n_heads, self.n_heads)
        check(self.n_heads % 2 == 0, "n_heads", self.n_heads, "even: linear priors have half as many")


MixerMaker = Callable[[MadSizes], MixerConfig]


def _attention(sizes: MadSizes) -> MixerConfig:
    return AttentionConfig(d_model=sizes.d_model, n_heads=sizes.n_heads)


def _fem(
    prior: Prior, *, read: Read = "temperature", outer_gate: bool = True, tdc_width: int | None = None
) -> MixerMaker:
    def make(sizes: MadSizes) -> MixerConfig:
        heads = sizes.n_heads // 2 if prior in ("linear", "gla") else sizes.n_heads
        return FreeEnergyMixerConfig(
            d_model=sizes.d_model, n_heads=heads, prior=prior, read=read, outer_gate=outer_gate, tdc_width=tdc_width
        )  # fmt: skip

    return make


def _mamba(sizes: MadSizes) -> MixerConfig:
    return MambaMixerConfig(d_model=sizes.d_model, d_state=sizes.d_state, d_head=sizes.d_model // 4)


@dataclass(frozen=True, slots=True)
class MadModel:
    """How a row of the table is built."""

    label: str
    mixer: MixerMaker
    equilibrium: bool = False
    """Whether an equilibrium layer follows the blocks."""


MODELS: dict[str, MadModel] = {
    "attention": MadModel("attention", _attention),
    "fem_softmax": MadModel("FEM softmax (C, L, T, G)", _fem("softmax")),
    "fem_gla": MadModel("FEM GLA", _fem("gla")),
    "fem_softmax_clt": MadModel("FEM softmax, C, L, T", _fem("softmax", outer_gate=False)),
    "fem_softmax_cl": MadModel("FEM softmax, C, L", _fem("softmax", read="free_energy", outer_gate=False)),
    "fem_softmax_c": MadModel("FEM softmax, C", _fem("softmax", read="mean", outer_gate=False)),
    "fem_softmax_mean": MadModel(
        "FEM softmax, none", _fem("softmax", read="mean", outer_gate=False, tdc_width=0)
    ),
    "fem_linear": MadModel("FEM linear", _fem("linear")),
    "fem_rnn_softmax": MadModel("FEM RNN-softmax", _fem("rnn_softmax")),
    "fem_mamba": MadModel("FEM Mamba", _fem("mamba")),
    "mamba": MadModel("Mamba", _mamba),
    "mamba_hopfield": MadModel("Mamba-Hopfield", _mamba, equilibrium=True),
}
"""C: local conditioning. L: the read is the free energy. T: learned temperature and inner gate. G: outer gate."""


def build_model(
    name: str,
    task: AbstractMadTask,
    sizes: MadSizes,
    *,
    seed: int,
    initialization: Initialization = "fan_in",
) -> Decoder:
    """The model of a row for a task, its weights drawn by the seed; torch's global generator is left as it was.

    Raises: ValueError for an unknown name, or if its mixers leave no room for a SwiGLU.
    """
    check_choice("model", name, MODELS)
    check_choice("initialization", initialization, get_args(Initialization))
    check_integer("seed", seed, minimum=0)
    with torch.random.fork_rng(devices=[]):
        d_ff = mad_d_ff(name, task, sizes)
        torch.manual_seed(seed)
        return _build(name, task, sizes, d_ff, initialization)


def mad_d_ff(name: str, task: AbstractMadTask, sizes: MadSizes) -> int:
    """Width of the SwiGLUs that gives a model the parameters of attention with ``sizes.d_ff``."""
    if name == "attention":
        return sizes.d_ff
    with torch.device("meta"):
        budget = count_parameters(_build("attention", task, sizes, sizes.d_ff))
    return matched_size(
        lambda d_ff: _build(name, task, sizes, d_ff), budget, multiple_of=D_FF_STEP, name="sizes.d_ff"
    )


def _build(
    name: str,
    task: AbstractMadTask,
    sizes: MadSizes,
    d_ff: int,
    initialization: Initialization = "fan_in",
) -> Decoder:
    row = MODELS[name]
    config = DecoderConfig(
        vocab_size=task.vocab_size,
        d_model=sizes.d_model,
        layers=(LayerConfig(mixer=row.mixer(sizes), d_ff=d_ff),) * sizes.n_blocks,
        equilibrium=_equilibrium(sizes) if row.equilibrium else None,
        max_seq_len=task.seq_len,
        tie_embeddings=False,
        norm_eps=NORM_EPS,
        initializer_range=None if initialization == "fan_in" else 0.02,
    )
    return (autoencoder if isinstance(task, Compression) else language_model)(config)


def _equilibrium(sizes: MadSizes) -> EquilibriumConfig:
    """Of half the mixers' channels, so that its parameters leave room for the SwiGLUs."""
    return EquilibriumConfig(
        d_model=sizes.d_model,
        d_inner=sizes.d_model,
        d_state=sizes.d_state,
        d_head=sizes.d_model // 4,
        n_patterns=sizes.n_patterns,
    )
