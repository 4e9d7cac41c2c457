"""Decoders of any mixers, with a plan at any layer or none, with an equilibrium or none."""

from itertools import product
from typing import Any

import torch

from decoder_cases import N_BITS, SIZES, liven
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig
from helmholtz.layers.mixer_config import AttentionConfig, MambaMixerConfig, MixerConfig
from helmholtz.models.base import LayerConfig, PlanConfig
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.solvers import SolverConfig

D, HEADS, LAYERS = SIZES["d_model"], SIZES["n_heads"], 3
SOLVER = SolverConfig(max_steps=100, rtol=1e-6, energy_rtol=1e-6)
EQUILIBRIUM = EquilibriumConfig(d_model=D, d_inner=2 * D, d_state=8, d_head=16, n_patterns=16, solver=SOLVER)
PLANS: dict[str, int | None] = {"no plan": None, "first": 0, "middle": 1, "last": LAYERS - 1}
EQUILIBRIA: dict[str, EquilibriumConfig | None] = {"plain": None, "equilibrium": EQUILIBRIUM}


def attention(**fields: Any) -> AttentionConfig:
    return AttentionConfig(d_model=D, n_heads=HEADS, **fields)


def fem(prior: str, **fields: Any) -> FreeEnergyMixerConfig:
    # a layer norm over the default 2 channels of the conditioning would only keep signs
    # at the eps of 1e-6 a query whose features are all 0 divides by almost nothing: rounding times 100
    return FreeEnergyMixerConfig(d_model=D, n_heads=HEADS, prior=prior, tdc_width=8, eps=0.01, **fields)  # type: ignore[arg-type]


def mamba() -> MambaMixerConfig:
    return MambaMixerConfig(d_model=D, d_state=8, d_head=16)


STACKS: dict[str, tuple[MixerConfig, ...]] = {
    "attention": (attention(n_kv_heads=2),) * LAYERS,
    **{f"fem-{prior}": (fem(prior),) * LAYERS for prior in PRIORS},
    "mamba": (mamba(),) * LAYERS,
    "mixed": (attention(), fem("gla"), mamba()),
}
ENCODERS: tuple[MixerConfig | None, ...] = (
    None,
    *(fem(prior, causal=False) for prior in ("softmax", "linear", "gla", "mamba")),
)

ALL = list(product(STACKS, PLANS, EQUILIBRIA))
PAIRS = [
    (stack, plan, ("plain", "equilibrium")[(i + j) % 2])
    for i, stack in enumerate(STACKS)
    for j, plan in enumerate(PLANS)
]
"""Every two of the three choices meet."""


def hybrid_config(stack: str, plan: str, equilibrium: str, **fields: Any) -> DecoderConfig:
    """Blocks of Mamba have no feed-forward, the others one; the encoder is another one with every stack."""
    layers = tuple(
        LayerConfig(mixer=mixer, d_ff=None if mixer.kind == "mamba" else 48) for mixer in STACKS[stack]
    )
    planned, layer = None, PLANS[plan]
    if layer is not None:
        mixer = ENCODERS[list(STACKS).index(stack) % len(ENCODERS)]
        encoder = None if mixer is None else LayerConfig(mixer=mixer, d_ff=40)
        sampler = "bits" if plan == "last" else "table"
        planned = PlanConfig(layer=layer, n_bits=N_BITS, post_sampler=sampler, encoder=encoder)
    sizes = {"vocab_size": SIZES["vocab_size"], "d_model": D, "max_seq_len": SIZES["max_seq_len"]}
    return DecoderConfig(
        **sizes | {"layers": layers, "plan": planned, "equilibrium": EQUILIBRIA[equilibrium]} | fields
    )


def hybrid(stack: str, plan: str, equilibrium: str, seed: int = 1, **fields: Any) -> Decoder:
    """One of them, with weights large enough that every part matters, in evaluation mode."""
    torch.manual_seed(seed)
    return liven(Decoder(hybrid_config(stack, plan, equilibrium, **fields)))
