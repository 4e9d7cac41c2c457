"""A small encoder whose mixer is attention or FEM at equal parameters: every token sees every other one."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_divides, check_fraction, check_integer
from helmholtz.layers.block import Block
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.init import scale_residual
from helmholtz.layers.mixer_config import build_mixer
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.sizing import matched_d_ff

MixerName = Literal["attention", "fem"]
Order = Literal["none", "given", "rotary"]
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder. Those of FEM are of the attention encoder that it equals in parameters."""

    mixer: MixerName
    """Softmax attention, or the Free Energy Mixer with a softmax prior, local conditioning and both gates."""
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    """d_model / n_heads is even: rotary positions turn pairs, and FEM's values have half the width of a head."""
    d_ff: int = 128
    """Width of the SwiGLU beside attention; FEM's takes what equal parameters leave."""
    dropout: float = 0.0
    """Of what a block writes into the residual stream."""

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, get_args(MixerName))
        for name in ("d_model", "n_layers", "n_heads", "d_ff"):
            check_integer(name, getattr(self, name))
        check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        width = self.d_model // self.n_heads
        check(width % 2 == 0, "d_model / n_heads", width, "even")
        check_fraction("dropout", self.dropout)

    def mixer_config(self, order: Order) -> FreeEnergyMixerConfig:
        """Attention is the read of the mean alone: without gates and conditioning the mixer is its prior."""
        check_choice("order", order, get_args(Order))
        rope_theta = 10000.0 if order == "rotary" else 0.0
        if self.mixer == "attention":
            width = self.d_model // self.n_heads
            return FreeEnergyMixerConfig(
                d_model=self.d_model, n_heads=self.n_heads, d_head=width, d_head_v=width, read="mean",
                outer_gate=False, tdc_width=0, rope_theta=rope_theta, causal=False,
            )  # fmt: skip
        ordered = order != "none"
        return FreeEnergyMixerConfig(
            d_model=self.d_model, n_heads=self.n_heads, tdc_width=None if ordered else 0,
            tdc_bidirectional=ordered, rope_theta=rope_theta, causal=False,
        )  # fmt: skip


class Encoder(nn.Module):
    """Pre-norm blocks and a last norm; no embedding and no head.

    Args:
        order: what the mixers know of the tokens' order: "none" (a set: equivariant under permutations, so that FEM
            goes without its conditioning, which is a scan), "given" (positions are in the tokens already), or "rotary".

    Source: Vaswani et al. 2017, section 3.1, with the blocks of the decoders here.
    """

    def __init__(self, config: EncoderConfig, order: Order) -> None:
        super().__init__()
        c, mixer = config, config.mixer_config(order)
        d_ff = matched_d_ff(mixer, d_ff=c.d_ff)
        blocks = [
            Block(
                build_mixer(mixer), SwiGLU(c.d_model, d_ff), c.d_model, norm_eps=NORM_EPS, dropout=c.dropout
            )
            for _ in range(c.n_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(c.d_model, eps=NORM_EPS)
        scale_residual([writer for block in blocks for writer in block.writers])

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
