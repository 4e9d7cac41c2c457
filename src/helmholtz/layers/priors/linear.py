"""Linear attention as a prior, with or without decay (GLA): constant-size state, linear time."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt, is_step, split_heads
from helmholtz.layers.sequence import SequenceLayout, reversed_reset
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._step import linear_step
from helmholtz.ops.linear_attention import linear_attention, linear_average
from helmholtz.ops.rope import rotate_heads

DECAY_TEMPERATURE = 16.0
"""Gated linear attention divides its log-sigmoid decay by this (Yang et al. 2024, section 4.4)."""


class LinearPrior(AbstractPrior):
    r"""Weights :math:`\phi(q_t) \cdot (e^{c_t - c_i} \phi(k_i))` over their sum; :math:`\phi = \mathrm{relu}+\epsilon`.

    ``decay`` is None (linear attention), "head" (one per head: simple GLA) or "channel" (one per key channel: GLA);
    :math:`c` is the running sum of ``logsigmoid(W x) / 16``.

    Without causality the same recurrence also runs from the end; the token itself counts once.
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__(config)
        c = config
        assert c.d_head is not None
        self.d_head, self.rope_theta, self.backend, self.decay = c.d_head, c.rope_theta, c.backend, c.decay
        self.query_widths = {"q": c.n_heads * c.d_head}
        self.key_widths = {"k": c.n_heads * c.d_head}
        if c.decay is not None:
            self.key_widths["decay"] = c.n_heads if c.decay == "head" else c.n_heads * c.d_head

    def forward(
        self,
        features: Features,
        values: Float[Tensor, "B G S V"],
        tilt: Tilt,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: Float[Tensor, "B H K C"] | None,
    ) -> tuple[Float[Tensor, "B H T N V"], Float[Tensor, "B H K C"]]:
        if state is not None and self.backend != "fla" and is_step(features["q"], tilt, layout, state):
            return linear_step(
                features["q"],
                features["k"],
                values,
                features.get("decay"),
                tilt.beta,
                layout.rotation(self.d_head, self.rope_theta) if self.rope_theta else (None, None),
                state,
                eps=self.eps,
                cap=tilt.cap,
                temperature=DECAY_TEMPERATURE,
            )
        q, k = (self._feature_map(features[name], layout) for name in ("q", "k"))
        decay = self._log_decay(features)
        if layout.mask is not None:
            real = layout.mask[:, None, :]
            k = k * real.unsqueeze(-1)
            decay = None if decay is None else decay * (real if decay.ndim == 3 else real.unsqueeze(-1))
        signals = tilt(values)
        v = signals.flatten(-2)
        with torch.autocast(q.device.type, enabled=False):
            if self.causal:
                averages, last = linear_average(
                    q, k, v, decay, state=state, reset=layout.reset, backend=self.backend
                )
            else:
                averages, last = self._both_ways(q, k, v.to(q.dtype), decay, layout)
        return averages.unflatten(-1, signals.shape[-2:]), last

    def _both_ways(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        v = F.pad(v, (0, 1), value=1.0)
        ahead, last = linear_attention(q, k, v, decay, reset=layout.reset, backend=self.backend)
        turned = None if decay is None else decay.flip(2)
        reset = reversed_reset(layout.reset)
        back, _ = linear_attention(q.flip(2), k.flip(2), v.flip(2), turned, reset=reset, backend=self.backend)
        sums = ahead + back.flip(2) - (q * k).sum(-1, keepdim=True) * v
        mass = sums[..., -1:]
        return sums[..., :-1] / torch.where(mass > 0, mass, 1.0), last

    def _feature_map(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        heads = x.unflatten(-1, (self.n_heads, -1))
        if self.rope_theta:
            heads = rotate_heads(heads, *layout.rotation(self.d_head, self.rope_theta))
        else:
            heads = heads.transpose(1, 2)
        return (
            F.threshold(heads.to(compute_dtype(x)), 0, 0) + self.eps
        )  # relu, which keeps its result for backward

    def _log_decay(self, features: Features) -> Tensor | None:
        if self.decay is None:
            return None
        raw = features["decay"].to(compute_dtype(features["decay"]))
        # logsigmoid; torch's own wakes every thread, even for a single token
        log_decay = F.softplus(raw, beta=-1, threshold=40) / DECAY_TEMPERATURE
        return log_decay.transpose(1, 2) if self.decay == "head" else split_heads(log_decay, self.n_heads)

    def init_state(self, position: Int[Tensor, "B"]) -> Float[Tensor, "B H K C"] | None:
        return None
