"""Grouped-query softmax attention with rotary positions: the baseline mixer."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_divides, check_integer
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.init import init_normal
from helmholtz.layers.placement import device_of
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.layers.state import KVCache
from helmholtz.ops.attention import attention_step, softmax_attention
from helmholtz.ops.rope import rotate_split


@final
class Attention(AbstractMixer[KVCache]):
    r"""Multi-head attention: a head reads :math:`\sum_i \mathrm{softmax}_i(q_t \cdot k_i / \sqrt{K})\, v_i`.

    Heads share keys and values in ``n_kv_heads`` groups. Rotary positions count real tokens only.

    Args:
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None means one per query head.
        rope_theta: base of the rotary wavelengths.
        causal: whether a token sees only itself and earlier ones; otherwise there is no state.

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
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = (
            d_model,
            n_heads,
            n_kv_heads,
            d_model // n_heads,
        )
        self.rope_theta, self.causal = rope_theta, causal
        self.in_proj = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.d_head, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        init_normal(self)

    def init_state(self, batch_size: int) -> KVCache:
        position = self._start(batch_size, device_of(self))
        return KVCache.empty(position, self.n_kv_heads, self.d_head, self.d_head)

    def _mix(
        self,
        x: Float[Tensor, "#B #T D"],
        source: Float[Tensor, "B T D"] | None,
        layout: SequenceLayout,
        state: KVCache | None,
    ) -> tuple[Float[Tensor, "B T D"], KVCache | None]:
        joint, mask = self._project(x, source), layout.mask
        cos, sin = layout.rotation(self.d_head, self.rope_theta)
        memory = None if state is None else state.claim(joint, mask)
        if state is not None and memory is not None:
            after = state.grown(memory, layout)
            read = attention_step(
                joint, cos, sin, *memory[:2], before=state.k.shape[2], heads=self.n_heads, key_mask=after.mask
            )
            return self.o_proj(read), after
        q, k, v = self._heads(joint, cos, sin)
        if state is not None:
            position = layout.advance(state.position)
            state = state.append(k, v, mask, capacity=layout.capacity, position=position)
            k, v, mask = state.k, state.v, state.mask
        read = softmax_attention(q, k, v, causal=self.causal, key_mask=mask, cu_seqlens=layout.cu_seqlens)
        return self.o_proj(read.transpose(1, 2).flatten(2)), state

    def project(
        self, x: Float[Tensor, "B T D"], layout: SequenceLayout, source: Float[Tensor, "B T D"] | None = None
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"], Float[Tensor, "B G T K"]]:
        """Rotated queries of ``x``, rotated keys and values of ``source`` (None: of ``x``)."""
        return self._heads(self._project(x, source), *layout.rotation(self.d_head, self.rope_theta))

    def _heads(
        self, joint: Float[Tensor, "B T NK"], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = joint.unflatten(-1, (-1, self.d_head))
        return rotate_split(heads, cos, sin, self.n_heads, self.n_kv_heads)

    def _project(
        self, x: Float[Tensor, "#B #T D"], source: Float[Tensor, "B T D"] | None
    ) -> Float[Tensor, "B T NK"]:
        """Queries of ``x``, keys and values of ``source``, side by side.

        With a source the joint projection runs on both and half of each result is kept: the product that is thrown
        away buys that ``in_proj`` is called as a module, whatever it has become.
        """
        joint: Tensor = self.in_proj(x)
        if source is not None:
            written: Tensor = self.in_proj(source)
            queries = self.n_heads * self.d_head
            q = joint[..., :queries].expand(*source.shape[:2], -1)
            joint = torch.cat([q, written[..., queries:]], dim=-1)
        return joint


def check_heads(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError unless ``n_kv_heads | n_heads | d_model`` and the head width is even."""
    check_integer("d_model", d_model)
    check_divides("n_heads", n_heads, "d_model", d_model)
    check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
    d_head = d_model // n_heads
    check(d_head % 2 == 0, "d_model / n_heads", d_head, "even, as rotary embeddings turn pairs")
