"""Grouped-query softmax attention with rotary positions: the baseline mixer."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_divides, check_integer
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.init import init_normal
from helmholtz.layers.linear import apply_linear, is_plain
from helmholtz.layers.sequence import SequenceLayout, sequence_layout
from helmholtz.layers.state import KVCache
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.rope import rotate_split
from helmholtz.ops.rotary_attention import rotary_attention


@final
class Attention(AbstractMixer[KVCache]):
    r"""Multi-head attention: a head reads :math:`\sum_i \mathrm{softmax}_i(q_t \cdot k_i / \sqrt{K})\, v_i`.

    Heads share keys and values in ``n_kv_heads`` groups. Rotary positions count real tokens only.

    Args:
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None means one per query head.
        rope_theta: base of the rotary wavelengths.
        causal: whether a token sees only itself and earlier ones; otherwise there is no ``step``.

    Raises: ValueError if heads do not divide or the head width is odd.
    Source: Vaswani et al. 2017, section 3.2; Ainslie et al., "GQA", 2023; Su et al., "RoFormer", 2021.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        rope_theta: float = 10000.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_heads(d_model, n_heads, n_kv_heads)
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_model // n_heads
        self.rope_theta, self.causal = rope_theta, causal
        self.in_proj = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.d_head, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        init_normal(self)

    def forward(
        self,
        x: Float[Tensor, "#B #T D"],
        *,
        source: Float[Tensor, "B T D"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix a whole sequence.

        Args:
            source: what keys and values are made of, in place of ``x``; token by token in the same places. Then ``x``
                may also be one vector for all of them, ``1 1 D``.
            attention_mask: bool or integer, non-zero where a token is real; any pattern.
            cu_seqlens: bounds of sequences packed end to end in one row.
        """
        self._check_width(x)
        layout = sequence_layout(x if source is None else source, attention_mask, cu_seqlens)
        heads = self._project(x, source, layout)
        if layout.mask is None and layout.cu_seqlens is None:
            read = rotary_attention(*heads, self.n_heads, self.n_kv_heads, causal=self.causal)
            return apply_linear(self.o_proj, read)
        q, k, v = rotate_split(*heads, self.n_heads, self.n_kv_heads)
        read = softmax_attention(
            q, k, v, causal=self.causal, key_mask=layout.mask, cu_seqlens=layout.cu_seqlens
        )
        return self._output(read, layout)

    def init_state(self, batch_size: int) -> KVCache:
        self._check_causal()
        return KVCache.empty(batch_size, self.n_kv_heads, self.d_head, self.d_head, self.o_proj.weight)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        state: KVCache,
        layout: SequenceLayout,
        *,
        source: Float[Tensor, "B T D"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KVCache]:
        self._check_causal()
        self._check_width(x)
        q, k, v = rotate_split(*self._project(x, source, layout), self.n_heads, self.n_kv_heads)
        state = state.append(k, v, layout.mask)
        return self._output(softmax_attention(q, state.k, state.v, key_mask=state.mask), layout), state

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError("causal: a stream has no future to attend to; only causal attention has a state")

    def _check_width(self, x: Tensor) -> None:
        width = self.n_heads * self.d_head
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x: wanted shape (B, T, d_model={width}), got {tuple(x.shape)}")

    def _project(
        self, x: Float[Tensor, "#B #T D"], source: Float[Tensor, "B T D"] | None, layout: SequenceLayout
    ) -> tuple[Float[Tensor, "B T N K"], Float[Tensor, "*BT K"], Float[Tensor, "*BT K"]]:
        """Queries of ``x``, keys and values of ``source`` side by side, and the table that turns them."""
        pads = None if layout.mask is None else ~layout.mask.unsqueeze(-1)
        if pads is not None and source is None:  # whatever a pad holds, NaN included
            x = x.masked_fill(pads, 0)
        if source is None:
            joint = apply_linear(self.in_proj, x)
        else:
            if pads is not None:
                source = source.masked_fill(pads, 0)
            q, kv = self._apart(x, source)
            joint = torch.cat([q.expand(*source.shape[:2], -1), kv], dim=-1)
        cos, sin = layout.rotation(self.d_head, self.rope_theta)
        return joint.view(*joint.shape[:2], -1, self.d_head), cos, sin

    def _apart(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``source``; whole products only where a module must be called."""
        widths = [self.n_heads * self.d_head, 2 * self.n_kv_heads * self.d_head]
        if not is_plain(self.in_proj):
            return self.in_proj(x)[..., : widths[0]], self.in_proj(source)[..., widths[0] :]
        q_weight, kv_weight = self.in_proj.weight.split(widths)
        return F.linear(x, q_weight), F.linear(source, kv_weight)

    def _output(self, read: Float[Tensor, "B H T K"], layout: SequenceLayout) -> Float[Tensor, "B T D"]:
        out = apply_linear(self.o_proj, read.transpose(1, 2).flatten(2))
        return out if layout.mask is None else out.masked_fill(~layout.mask.unsqueeze(-1), 0)


def check_heads(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError unless ``n_kv_heads | n_heads | d_model`` and the head width is even."""
    check_integer("d_model", d_model)
    check_divides("n_heads", n_heads, "d_model", d_model)
    check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
    d_head = d_model // n_heads
    check(d_head % 2 == 0, "d_model / n_heads", d_head, "even, as rotary embeddings turn pairs")
