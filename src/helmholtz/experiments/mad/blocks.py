"""The two backbones of the MAD benchmark: a language model and an autoencoder around any mixer.

Both are an embedding without positions and blocks of a mixer and a SwiGLU; the language model reads logits from every
token, the autoencoder all tokens of a sequence from its last state. Initialised as published: in the language model the
linear maps of attention, SwiGLU and head as PyTorch makes them (uniform to ``1/sqrt(fan_in)``), in the autoencoder from
N(0, 0.02); mixers other than attention keep the initialisation of their own layer. Unlike there, attention has no
biases.

Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024, appendix B and its public code.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.layers.attention import Attention
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.block import Block
from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.layers.init import init_normal
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.sequence import sequence_layout

NORM_EPS = 1e-5


class AbstractMadModel(nn.Module, abc.ABC):
    """Embedding N(0, 0.02), a block per mixer, and at the end an equilibrium layer if there is one.

    Args:
        mixers: one per block, from tokens to tokens of width ``d_model``.
        equilibrium: reads the normed stream of the last block; its output replaces the stream.

    Raises: ValueError if there is no mixer or a size is not positive.
    """

    def __init__(
        self,
        vocab_size: int,
        mixers: Sequence[AbstractMixer[Any]],
        *,
        d_model: int,
        d_ff: int,
        equilibrium: EquilibriumLayer | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"vocab_size": vocab_size, "d_model": d_model, "d_ff": d_ff}.items():
            check_integer(name, size)
        check(len(mixers) > 0, "mixers", list(mixers), "at least one")
        self.embed = nn.Embedding(vocab_size, d_model)
        init_normal(self.embed)
        blocks = [Block(mixer, SwiGLU(d_model, d_ff), d_model, norm_eps=NORM_EPS) for mixer in mixers]
        self.blocks: Sequence[Block[Any]] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.equilibrium = equilibrium
        self.context_norm = None if equilibrium is None else RMSNorm(d_model, eps=NORM_EPS)

    @abc.abstractmethod
    def logits_at(self, tokens: Int[Tensor, "B T"], places: Bool[Tensor, "B T"]) -> Float[Tensor, "N vocab"]:
        """Logits where ``places`` is true, in the order of batch and time.

        Those of the whole sequence; the head is not computed for the others.
        """

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocab"]:
        """Logits of every place."""
        places = torch.ones_like(tokens, dtype=torch.bool)
        return self.logits_at(tokens, places).unflatten(0, tuple(tokens.shape))

    def _stream(self, tokens: Int[Tensor, "B T"], rows: Int[Tensor, "N"] | None) -> Float[Tensor, "N D"]:
        """The residual stream after all blocks at the given rows of ``B T``; None means all of them."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        if self.equilibrium is not None and self.context_norm is not None:
            x = self.equilibrium(self.context_norm(x), sequence_layout(x)).output
        return _take(x, rows)


@final
class MadLanguageModel(AbstractMadModel):
    """Next-token logits: RMS norm and a linear head with a bias."""

    def __init__(
        self,
        vocab_size: int,
        mixers: Sequence[AbstractMixer[Any]],
        *,
        d_model: int,
        d_ff: int,
        equilibrium: EquilibriumLayer | None = None,
    ) -> None:
        super().__init__(vocab_size, mixers, d_model=d_model, d_ff=d_ff, equilibrium=equilibrium)
        self.norm = RMSNorm(d_model, eps=NORM_EPS)
        self.head = nn.Linear(d_model, vocab_size)
        nn.init.zeros_(self.head.bias)
        for block in self.blocks:
            for module in (block.mixer, block.mlp):
                if isinstance(module, Attention | SwiGLU):
                    _init_as_torch(module)

    def logits_at(self, tokens: Int[Tensor, "B T"], places: Bool[Tensor, "B T"]) -> Float[Tensor, "N vocab"]:
        rows = None if bool(places.all()) else places.flatten().nonzero().squeeze(1)
        return self.head(self.norm(self._stream(tokens, rows)))


@final
class MadAutoencoder(AbstractMadModel):
    """Logits of all tokens of a sequence from its last state and a fixed table of positions.

    The decoder is RMS norm, linear, GELU, twice, of width ``d_model``, then RMS norm and a linear head.

    Args:
        seq_len: length of the sequences, and rows of the table.
    """

    def __init__(
        self,
        vocab_size: int,
        mixers: Sequence[AbstractMixer[Any]],
        *,
        seq_len: int,
        d_model: int,
        d_ff: int,
        equilibrium: EquilibriumLayer | None = None,
    ) -> None:
        super().__init__(vocab_size, mixers, d_model=d_model, d_ff=d_ff, equilibrium=equilibrium)
        sinusoids(seq_len, d_model)  # its checks; a table kept here would stay unfilled after ``to_empty``
        self.seq_len = seq_len
        self.norms = nn.ModuleList([RMSNorm(d_model, eps=NORM_EPS) for _ in range(3)])
        widths = (d_model, d_model, vocab_size)
        self.linears = nn.ModuleList([nn.Linear(d_model, width) for width in widths])
        init_normal(self.linears)

    def logits_at(self, tokens: Int[Tensor, "B T"], places: Bool[Tensor, "B T"]) -> Float[Tensor, "N vocab"]:
        batch, time = tokens.shape
        check(time == self.seq_len, "tokens", tuple(tokens.shape), f"of {self.seq_len} tokens each")
        code = self._stream(tokens, torch.arange(1, batch + 1, device=tokens.device) * time - 1)
        row, place = places.nonzero(as_tuple=True)
        x = code[row] + sinusoids(time, code.shape[-1], code.device).to(code.dtype)[place]
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


def _take(x: Float[Tensor, "B T D"], rows: Int[Tensor, "N"] | None) -> Float[Tensor, "N D"]:
    x = x.flatten(0, 1)
    return x if rows is None else x[rows]


def _init_as_torch(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.reset_parameters()
