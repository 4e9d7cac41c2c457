"""Softmax attention as a prior: the exact, quadratic one, with grouped key/value heads."""

from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.layers.state import KVCache
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.free_energy import softmax_read, softmax_step
from helmholtz.ops.rope import rotate_heads


class SoftmaxPrior(AbstractPrior):
    """``p_t(i) = softmax_i(q_t . k_i / sqrt(K))``, rotary positions unless ``rope_theta`` is 0.

    The decode state holds keys and values; signals are computed from the values anew in each step, so a token costs
    ``G (K + V)`` numbers.
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__(config)
        c = config
        assert c.n_kv_heads is not None and c.d_head is not None and c.d_head_v is not None
        self.n_kv_heads, self.d_head, self.d_head_v = c.n_kv_heads, c.d_head, c.d_head_v
        self.rope_theta, self.backend = c.rope_theta, c.backend
        self.query_widths = {"q": c.n_heads * c.d_head}
        self.key_widths = {"k": c.n_kv_heads * c.d_head}

    def forward(
        self,
        features: Features,
        values: Float[Tensor, "B G S V"],
        tilt: Tilt,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: KVCache | None,
    ) -> tuple[Float[Tensor, "B H T N V"], KVCache | None]:
        mask = key_layout.mask
        memory = state.claim(features["v"], mask) if state is not None and tilt.by_kernels else None
        if state is not None and memory is not None:
            after = state.grown(memory, layout)
            return softmax_step(
                features["q"],
                features["k"],
                features["v"],
                tilt.beta,
                layout.rotation(self.d_head, self.rope_theta) if self.rope_theta else (None, None),
                *memory[:2],
                before=state.k.shape[2],
                cap=tilt.cap,
                key_mask=after.mask,
                backend=self.backend,
            ), after
        q, k = (
            features[name].unflatten(-1, (heads, -1))
            for name, heads in (("q", self.n_heads), ("k", self.n_kv_heads))
        )
        if self.rope_theta:
            q = rotate_heads(q, *layout.rotation(self.d_head, self.rope_theta))
            k = rotate_heads(k, *key_layout.rotation(self.d_head, self.rope_theta))
        else:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if state is not None:
            position = key_layout.advance(state.position)
            state = state.append(k, values, mask, capacity=key_layout.capacity, position=position)
            k, values, mask = state.k, state.v, state.mask
        if tilt.by_kernels and tilt.beta is not None:
            return softmax_read(
                q,
                k,
                values,
                tilt.beta,
                cap=tilt.cap,
                causal=self.causal,
                key_mask=mask,
                cu_seqlens=layout.cu_seqlens,
                backend=self.backend,
            ), state
        signals = tilt(values)
        wide = compute_dtype(q) if signals.shape[-2] > 1 else q.dtype
        with full_precision(q.device):
            averages = softmax_attention(
                q.to(wide),
                k.to(wide),
                signals.flatten(-2).to(wide),
                causal=self.causal,
                key_mask=mask,
                cu_seqlens=layout.cu_seqlens,
                backend=self.backend,
            )
        return averages.unflatten(-1, signals.shape[-2:]).to(compute_dtype(q)), state

    def init_state(self, position: Int[Tensor, "B"]) -> KVCache:
        return KVCache.empty(position, self.n_kv_heads, self.d_head, self.d_head_v)
