"""Grouped-query softmax attention with rotary positions: the baseline mixer."""

from typing import final

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_divides, check_integer
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.init import init_normal
from helmholtz.layers.sequence import SequenceLayout, sequence_layout
from helmholtz.layers.state import KVCache
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.rope import rope


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
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        init_normal(self)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        self._check_width(x)
        layout = sequence_layout(x, attention_mask, cu_seqlens)
        q, k, v = self._project(x, layout)
        read = softmax_attention(
            q, k, v, causal=self.causal, key_mask=layout.mask, cu_seqlens=layout.cu_seqlens
        )
        return self._output(read, layout)

    def init_state(self, batch_size: int) -> KVCache:
        self._check_causal()
        return KVCache.empty(batch_size, self.n_kv_heads, self.d_head, self.d_head, self.k_proj.weight)

    def step(
        self,
        x: Float[Tensor, "B T D"],
        state: KVCache,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KVCache]:
        self._check_causal()
        self._check_width(x)
        layout = sequence_layout(x, attention_mask, position=state.position)
        q, k, v = self._project(x, layout)
        state = state.append(k, v, layout.mask)
        return self._output(softmax_attention(q, state.k, state.v, key_mask=state.mask), layout), state

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError("causal: a stream has no future to attend to; only causal attention has a state")

    def _check_width(self, x: Tensor) -> None:
        width = self.q_proj.in_features
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x: wanted shape (B, T, d_model={width}), got {tuple(x.shape)}")

    def _project(
        self, x: Float[Tensor, "B T D"], layout: SequenceLayout
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"], Float[Tensor, "B G T K"]]:
        if layout.mask is not None:  # whatever a pad holds, NaN included
            x = x.masked_fill(~layout.mask.unsqueeze(-1), 0)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rope(heads, layout.positions, theta=self.rope_theta) for heads in (q, k))
        return q, k, v

    def _output(self, read: Float[Tensor, "B H T K"], layout: SequenceLayout) -> Float[Tensor, "B T D"]:
        out = self.o_proj(read.transpose(1, 2).flatten(2))
        return out if layout.mask is None else out.masked_fill(~layout.mask.unsqueeze(-1), 0)


def check_heads(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError unless ``n_kv_heads | n_heads | d_model`` and the head width is even."""
    check_integer("d_model", d_model)
    check_divides("n_heads", n_heads, "d_model", d_model)
    check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
    d_head = d_model // n_heads
    check(d_head % 2 == 0, "d_model / n_heads", d_head, "even, as rotary embeddings turn pairs")
