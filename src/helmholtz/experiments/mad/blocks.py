"""The language model and the autoencoder of the MAD benchmark: decoders with the published heads.

The language model reads logits from every token, the autoencoder all tokens of a sequence from its last state. All
weights start by their fan-in (``layers.init``). With ``config.initializer_range`` they start as in the published code:
in the language model the linear maps of attention, SwiGLU and head as PyTorch makes them, uniform to ``1/sqrt(fan_in)``
(the same variance), and all else, which is mixers other than attention and the whole autoencoder, from
N(0, initializer_range^2). Unlike there, attention has no biases.

Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024, appendix B and its public code.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.layers.attention import Attention
from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.layers.init import init_normal, initializer_range
from helmholtz.layers.mixer_config import build_mixer
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig


def language_model(config: DecoderConfig) -> Decoder:
    """Next-token logits of a head with a bias."""
    model = _decoder(config)
    model.unembed = nn.Linear(config.d_model, config.vocab_size)
    if config.initializer_range is None:
        init_normal(model.unembed)
    else:
        nn.init.zeros_(model.unembed.bias)
        _init_as_torch(model)
    return model


def autoencoder(config: DecoderConfig) -> Decoder:
    """Logits of all tokens of a sequence of ``max_seq_len`` tokens from the last state."""
    model = _decoder(config)
    model.norm = nn.Identity()  # type: ignore[assignment]
    with initializer_range(config.initializer_range):
        model.unembed = LastStateHead(  # type: ignore[assignment]
            config.max_seq_len, config.d_model, config.vocab_size, norm_eps=config.norm_eps
        )
    return model


def _decoder(config: DecoderConfig) -> Decoder:
    """A decoder without the scaling of residual branches with depth.

    Drawn in the order of the committed results: mixers, equilibrium, embedding, feed-forwards.
    """
    with torch.random.fork_rng(devices=[]):  # all that it draws is drawn anew
        model = Decoder(config)
    with initializer_range(config.initializer_range):
        for block, layer in zip(model.blocks, config.layers, strict=True):
            block.mixer = build_mixer(layer.mixer)
        if config.equilibrium is not None:
            model.equilibrium = EquilibriumLayer(config.equilibrium)
        model.embed = nn.Embedding(config.vocab_size, config.d_model)
        init_normal(model.embed)
        for block, layer in zip(model.blocks, config.layers, strict=True):
            assert layer.d_ff is not None
            block.mlp = SwiGLU(config.d_model, layer.d_ff)
    return model


@final
class LastStateHead(nn.Module):
    """Logits of all tokens of a sequence from its last state and a fixed table of positions.

    RMS norm, linear, GELU, twice, of width ``d_model``, then RMS norm and a linear map.

    Args:
        seq_len: length of the sequences, and rows of the table.
    """

    def __init__(self, seq_len: int, d_model: int, vocab_size: int, *, norm_eps: float) -> None:
        super().__init__()
        sinusoids(seq_len, d_model)  # its checks; a table kept here would stay unfilled after ``to_empty``
        self.seq_len = seq_len
        self.norms = nn.ModuleList([RMSNorm(d_model, eps=norm_eps) for _ in range(3)])
        self.linears = nn.ModuleList([nn.Linear(d_model, width) for width in (d_model, d_model, vocab_size)])
        init_normal(self.linears)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T vocab"]:
        time, width = x.shape[1:]
        check(time == self.seq_len, "tokens", tuple(x.shape[:2]), f"of {self.seq_len} tokens each")
        x = x[:, -1:] + sinusoids(time, width, x.device).to(x.dtype)
        for norm, linear in zip(self.norms[:-1], self.linears[:-1], strict=True):
            x = F.gelu(linear(norm(x)))
        logits: Tensor = self.linears[-1](self.norms[-1](x))
        return logits


def sinusoids(n: int, d_model: int, device: torch.device | None = None) -> Float[Tensor, "n D"]:
    r"""Sines, then cosines of ``t * 10000^(-j / (D/2 - 1))`` for ``j < D/2``. Raises: ValueError for an odd ``D``."""
    check_integer("n", n)
    check(d_model % 2 == 0 and d_model >= 4, "d_model", d_model, "even and at least 4")
    steps = torch.arange(d_model // 2, device=device) / (d_model // 2 - 1)
    angles = torch.arange(n, device=device).unsqueeze(1) * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _init_as_torch(model: Decoder) -> None:
    for block in model.blocks:
        for module in (block.mixer, block.mlp):
            if isinstance(module, Attention | SwiGLU):
                for child in module.modules():
                    if isinstance(child, nn.Linear):
                        child.reset_parameters()
