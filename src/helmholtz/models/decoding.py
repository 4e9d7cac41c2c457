"""Decoding one token per row through blocks of plain attention, by their tensors instead of their modules.

At batch 1 a small decoder spends more time on the calls of modules, on masks and on bookkeeping than on arithmetic.
``model.step`` stays the general way; this is the same computation with nothing else around it, for the inner loop of
``generate``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.latent import BitsPostSampler, LatentEncoder, SourceBlock, TablePostSampler
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.row_draws import RowDropout
from helmholtz.models.base import AbstractDecoder, LMState
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.transformer import Transformer
from helmholtz.ops.rope import rope_table

_PLAIN = {
    *(Transformer, FreeTransformer, Block, SourceBlock, Attention, SwiGLU, LatentEncoder),
    *(TablePostSampler, BitsPostSampler, RowDropout, nn.ModuleList, nn.Linear, RMSNorm, nn.Embedding),
}


def is_plain(model: AbstractDecoder) -> bool:
    """Whether the model is what it was built as: attention blocks, no module replaced (adapters), no hooks."""
    return all(
        type(module) in _PLAIN and not (module._forward_hooks or module._forward_pre_hooks)
        for module in model.modules()
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """A block's tensors; ``eps`` of both norms."""

    mixer_norm: Tensor
    in_proj: Tensor
    o_proj: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float


class TokenDecoder:
    """Reads one token per row after a prefill. The same logits as ``model.step``, up to rounding.

    Holds references to the weights, no copies, and keeps its caches to itself: made for one continuation.

    Args:
        model: a model of which ``is_plain``.
        state: the stream after the prompt.
        mask: real tokens of the prompt; None if all are.
    """

    def __init__(self, model: AbstractDecoder, state: LMState, mask: Bool[Tensor, "B S"] | None) -> None:
        attention = model.blocks[0].mixer
        assert isinstance(attention, Attention)
        self.model, self.mask, self.position = model, mask, state.position
        self.heads, self.groups, self.d_head = attention.n_heads, attention.n_kv_heads, attention.d_head
        self.theta = attention.rope_theta
        self.planned_layer = model.split_layer if isinstance(model, FreeTransformer) else None
        self.weights = [_weights(block) for block in model.blocks]
        self.caches = [(block.k, block.v) for block in state.blocks]

    def step(
        self, tokens: Int[Tensor, "B 1"], plan: Float[Tensor, "B 1 D"] | None = None
    ) -> Float[Tensor, "B vocab"]:
        """Logits after the tokens, whose ids the caller has checked.

        Args:
            plan: of a Free Transformer, what its post-sampler makes of the tokens' codes.
        """
        model = self.model
        x = F.embedding(tokens, model.embed.weight)
        cos, sin = rope_table(self.position, self.d_head, theta=self.theta)
        turn = (cos[:, None, None], sin[:, None, None])
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        for layer, weights in enumerate(self.weights):
            x = self._block(layer, weights, x, turn, plan if layer == self.planned_layer else None)
        self.position = self.position + 1
        x = F.rms_norm(x[:, 0], x.shape[-1:], model.norm.weight, model.norm.eps)
        return F.linear(x, model.unembed.weight)

    def _block(
        self, layer: int, w: _Weights, x: Tensor, turn: tuple[Tensor, Tensor], plan: Tensor | None
    ) -> Float[Tensor, "B 1 D"]:
        rows, width = len(x), x.shape[-1:]
        # queries of x, keys and values of x + r: both through the same product, one below the other
        seen = x if plan is None else torch.cat([x, x + plan])
        joint = F.linear(F.rms_norm(seen, width, w.mixer_norm, w.eps), w.in_proj)
        joint = joint.view(-1, rows, self.heads + 2 * self.groups, 1, self.d_head)
        both = joint[:, :, : self.heads + self.groups].to(turn[0].dtype)
        turned = (both * turn[0] + both.roll(self.d_head // 2, -1) * turn[1]).to(joint.dtype)
        k, v = self.caches[layer]
        k = torch.cat([k, turned[-1, :, self.heads :]], dim=2)
        v = torch.cat([v, joint[-1, :, self.heads + self.groups :]], dim=2)
        self.caches[layer] = k, v
        read = F.scaled_dot_product_attention(
            turned[0, :, : self.heads],
            k,
            v,
            attn_mask=None if self.mask is None else self.mask[:, None, None],
            enable_gqa=self.heads != self.groups,
        )
        x = x + F.linear(read.view(rows, 1, -1), w.o_proj)
        gate, up = F.linear(F.rms_norm(x, width, w.mlp_norm, w.eps), w.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, w.down)


def _weights(block: Block) -> _Weights:
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, Attention) and mlp is not None and block.mlp_norm is not None
    return _Weights(
        mixer_norm=block.mixer_norm.weight,
        in_proj=mixer.in_proj.weight,
        o_proj=mixer.o_proj.weight,
        mlp_norm=block.mlp_norm.weight,
        gate_up=mlp.gate_up_proj.weight,
        down=mlp.down_proj.weight,
        eps=block.mixer_norm.eps,
    )
