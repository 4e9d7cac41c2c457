"""Attention-free softmax over time (AFT, a normalised linear RNN) as a prior: one weight per channel and token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt, is_step
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._step import rnn_softmax_step, rope_step, takes_steps
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.rope import rotate_heads


class RNNSoftmaxPrior(AbstractPrior):
    r"""``p_t(i)`` proportional to :math:`e^{k_i}` per value channel; the query gates the read after the logarithm.

    Gating inside the average would add ``log(gate) / beta`` to the free energy. Without causality every token of a
    sequence reads the same softmax over all of its tokens.

    Source: Zhai et al., "An Attention Free Transformer", 2021; Lu & Yang 2026.
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__(config)
        c = config
        assert c.d_head is not None
        self.d_head, self.rope_theta = c.d_head, c.rope_theta
        self.query_widths = {"q": c.n_heads * c.d_head}
        self.key_widths = {"k": c.n_heads * c.d_head}

    def forward(
        self,
        features: Features,
        values: Float[Tensor, "B G S V"],
        tilt: Tilt,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: RNNSoftmaxState | None,
    ) -> tuple[Float[Tensor, "B H T N V"], RNNSoftmaxState | None]:
        if state is not None and is_step(features["k"], tilt, layout, state.sums):
            rotation = layout.rotation(self.d_head, self.rope_theta) if self.rope_theta else (None, None)
            return rnn_softmax_step(features["k"], values, tilt.beta, rotation, state, cap=tilt.cap)
        k = self._rotated(features["k"], layout).flatten(2)
        if layout.mask is not None:
            k = k.masked_fill(~layout.mask.unsqueeze(-1), -torch.inf)
        signals = tilt(values, signals_first=True).to(compute_dtype(values)).permute(0, 2, 3, 1, 4)
        with torch.autocast(k.device.type, enabled=False):
            if self.causal:
                averaged, state = rnn_softmax(k, signals.flatten(-2), state=state, reset=layout.reset)
            else:
                averaged = self._whole(k.to(signals.dtype), signals.flatten(-2), layout)
        return averaged.unflatten(-1, (self.n_heads, -1)).permute(0, 3, 1, 2, 4), state

    def _whole(self, k: Tensor, signals: Tensor, layout: SequenceLayout) -> Tensor:
        if layout.reset is None or layout.cu_seqlens is None:
            return _global_average(k, signals)
        sequence = layout.reset[0].cumsum(0) - 1  # packed: one row
        return _averages_within(k[0], signals[0], sequence, len(layout.cu_seqlens) - 1).unsqueeze(0)

    def output_gate(self, features: Features, layout: SequenceLayout) -> Float[Tensor, "B T H V"]:
        return self._rotated(features["q"], layout)

    def _rotated(self, x: Tensor, layout: SequenceLayout) -> Float[Tensor, "B T H K"]:
        heads = x.unflatten(-1, (self.n_heads, -1))
        if not self.rope_theta:
            return heads
        cos, sin = layout.rotation(self.d_head, self.rope_theta)
        if takes_steps(x, cos):
            return rope_step([x], cos, sin)[0].view_as(heads)
        return rotate_heads(heads, cos, sin, heads_first=False).transpose(1, 2)

    def init_state(self, position: Int[Tensor, "B"]) -> None:
        return None


def _global_average(k: Float[Tensor, "B T C"], signals: Float[Tensor, "B T N C"]) -> Float[Tensor, "B T N C"]:
    """Softmax of ``k`` over time, the same for every query; a row without a real token averages to 0."""
    empty = torch.isneginf(k).all(1, keepdim=True)
    weights = k.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0)
    return torch.einsum("btc,btnc->bnc", weights, signals).unsqueeze(1).expand_as(signals)


def _averages_within(
    k: Float[Tensor, "T C"], signals: Float[Tensor, "T N C"], sequence: Int[Tensor, "T"], count: int
) -> Float[Tensor, "T N C"]:
    """The same within each of ``count`` sequences that lie end to end."""
    keys = k.detach()  # the largest cancels in the quotient, as in the causal form
    top = keys.new_full((count, k.shape[1]), torch.finfo(k.dtype).min)
    top = top.scatter_reduce(0, sequence.unsqueeze(1).expand_as(keys), keys, "amax")
    weights = (k - top[sequence]).exp().unsqueeze(1)
    weighted = torch.cat([weights * signals, weights], dim=1)
    sums = weighted.new_zeros(count, *weighted.shape[1:]).index_add(0, sequence, weighted)
    signal, total = sums[:, :-1], sums[:, -1:]
    nothing = total <= 0
    return (signal / total.masked_fill(nothing, 1)).masked_fill(nothing, 0)[sequence]
