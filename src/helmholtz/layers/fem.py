"""The Free Energy Mixer: an attention replacement that reads values between their mean and their maximum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.init import init_normal
from helmholtz.layers.placement import device_of
from helmholtz.layers.priors import PRIOR_CLASSES
from helmholtz.layers.priors.base import Tilt, split_heads
from helmholtz.layers.row_draws import RowDropout
from helmholtz.layers.sequence import SequenceLayout, sequence_layout, zero_pads
from helmholtz.layers.time_decay_conv import TimeDecayConditioning
from helmholtz.ops._compute import as_dtype, compute_dtype
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.modulate import modulated_split


@dataclass(frozen=True, slots=True)
class MixerState:
    """What a mixer remembers of the tokens it has seen; of constant size for every prior but softmax."""

    position: Int[Tensor, "B"]
    """Real tokens each row has seen."""
    prior: Any
    """State of the prior: a ``KVCache``, sums, or None before the first token."""
    tdc: Float[Tensor, "B W"] | None
    """State of the time-decay conditioning."""
    tdc_source: Float[Tensor, "B W"] | None = None
    """The same of the source; None while it is the stream itself."""


class FreeEnergyMixer(AbstractMixer[MixerState]):
    r"""Two-level gated free-energy read.

    .. math:: \mu = \sum_i p(i) v_i, \quad F = \beta^{-1} \log \sum_i p(i) e^{\beta v_i}, \quad
              y = W_o \, [\, g \odot ((1 - \lambda) \mu + \lambda F)\,]

    ``p`` comes from the prior, ``beta`` is learned per channel, the inner gate ``lambda`` in (0, 1) and the outer gate
    ``g > 0`` per token and channel. ``lambda = 0, g = 1`` is the prior itself: plain attention for softmax.

    A pad influences nothing and its output is exactly 0. Where ``|beta v| > cap`` the mean stays linear in ``v`` and
    ``F`` saturates.

    Cost: that of the prior's read with two signals per channel, plus O(T D) element-wise.
    Source: Lu & Yang, "Free Energy Mixer", ICLR 2026.
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.d_model, self.causal = c.d_model, c.causal
        assert c.n_kv_heads is not None and c.d_head_v is not None and c.tdc_width is not None
        self.prior = PRIOR_CLASSES[c.prior](c)
        width = c.n_heads * c.d_head_v
        self.query_widths = dict(self.prior.query_widths)
        if c.read == "temperature":
            self.query_widths["inner"] = width
        if c.outer_gate:
            self.query_widths["outer"] = width
        self.key_widths = {**self.prior.key_widths, "v": c.n_kv_heads * c.d_head_v}
        self._names = (*self.query_widths, *self.key_widths)
        self._widths = [*self.query_widths.values(), *self.key_widths.values()]
        projected = sum(self._widths)
        self.in_proj = nn.Linear(c.d_model, projected, bias=c.bias)
        self.tdc = None
        if c.tdc_width:
            self.tdc = TimeDecayConditioning(
                c.d_model,
                c.tdc_width,
                projected,
                bidirectional=c.tdc_bidirectional,
                norm_first=c.tdc_norm_first,
            )
        if c.read == "temperature":
            self.theta = nn.Parameter(torch.full((c.n_kv_heads, c.d_head_v), c.theta_init))
        self.o_proj = nn.Linear(width, c.d_model, bias=c.bias)
        self.dropout = RowDropout(c.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as ``init_normal``, biases 0; the conditioning's output 0, so that it starts without effect."""
        init_normal(self)
        if self.tdc is not None:
            nn.init.zeros_(self.tdc.out_proj.weight)

    @property
    def beta_max(self) -> Float[Tensor, "G V"]:
        """Inverse temperature of the free-energy branch, in 1/units of the values."""
        c = self.config
        if c.read == "temperature":
            theta = self.theta
            wide = compute_dtype(theta)
            return F.softplus(theta if theta.dtype == wide else theta.to(wide)) + c.eps
        assert c.n_kv_heads is not None and c.d_head_v is not None
        return torch.ones(c.n_kv_heads, c.d_head_v, device=device_of(self))

    def forward(
        self,
        x: Float[Tensor, "#B #T D"],
        *,
        context: Float[Tensor, "_ S _"] | None = None,
        context_mask: Shaped[Tensor, "..."] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        layout: SequenceLayout | None = None,
        state: MixerState | None = None,
        source: Float[Tensor, "_ _ _"] | None = None,
    ) -> Float[Tensor, "B T D"] | tuple[Float[Tensor, "B T D"], MixerState]:
        """``AbstractMixer.forward``, and cross-attention.

        Args:
            context: what is read, in place of ``x``, of any length: softmax prior, ``causal=False``; excludes a source.
                The conditioning runs over ``x`` for queries and gates, over ``context`` for keys and values.
            context_mask: the ``attention_mask`` of ``context``.
        """
        if context is None:
            check(context_mask is None, "context_mask", "a mask", "None: there is no context to mask")
            return super().forward(
                x,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                layout=layout,
                state=state,
                source=source,
            )
        self._check_context(x, context, cu_seqlens, state, source)
        layout = self._layout(x, attention_mask, None, layout, None)
        key_layout = sequence_layout(context, context_mask)
        x, context = zero_pads(x, layout), zero_pads(context, key_layout)
        return zero_pads(self._read_from(x, context, layout, key_layout, None)[0], layout)

    def init_state(self, batch_size: int) -> MixerState:
        position = self._start(batch_size, device_of(self))
        return MixerState(position, self.prior.init_state(position), None)

    def project(
        self,
        x: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        source: Float[Tensor, "B T D"] | None = None,
    ) -> tuple[Mapping[str, Float[Tensor, "B T _"]], Float[Tensor, "B G T V"]]:
        """``(features by name, values)`` as the prior and the gates see them: for looking inside."""
        source = None if source is None else zero_pads(source, layout)
        features, _, _ = self._features(zero_pads(x, layout), source, layout, layout, None)
        return features, split_heads(features["v"], self.config.n_kv_heads or 0)

    def _mix(
        self,
        x: Float[Tensor, "#B #T D"],
        source: Float[Tensor, "B T D"] | None,
        layout: SequenceLayout,
        state: MixerState | None,
    ) -> tuple[Float[Tensor, "B T D"], MixerState | None]:
        if source is not None:
            x = x.expand_as(source)
        return self._read_from(x, source, layout, layout, state)

    def _read_from(
        self,
        x: Tensor,
        written: Tensor | None,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: MixerState | None,
    ) -> tuple[Tensor, MixerState | None]:
        """The read of ``x`` from what is ``written``, a source or a context; None means ``x`` itself."""
        prior, c = self.prior, self.config
        features, tdc, tdc_source = self._features(x, written, layout, key_layout, state)
        values = split_heads(features["v"], c.n_kv_heads or 0)
        prior_state = None if state is None else state.prior
        tilt = Tilt(None if c.read == "mean" else self.beta_max, c.cap)
        mixed, prior_state = prior(features, values, tilt, layout, key_layout, prior_state)
        read = self._read(mixed, tilt.beta, features, prior.output_gate(features, layout)).flatten(2)
        y = self.dropout(self.o_proj(as_dtype(read, values.dtype)))
        if state is None:
            return y, None
        return y, MixerState(layout.advance(state.position), prior_state, tdc, tdc_source)

    def _features(
        self,
        x: Tensor,
        written: Tensor | None,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: MixerState | None,
    ) -> tuple[Mapping[str, Tensor], Tensor | None, Tensor | None]:
        """Every pre-activation by name, and the states of the conditioning of ``x`` and of what is written.

        A joint projection of which either stream needs a part runs on both; half of each result is dropped.
        """
        before = (None, None) if state is None else (state.tdc, state.tdc_source)
        features, tdc = self._condition(x, layout, before[0])
        if written is None and before[1] is None:
            return features, tdc, None
        # a stream that had no source so far had x as its source, and one that had a source may go on with x
        source_state = before[0] if before[1] is None else before[1]
        others, tdc_source = self._condition(x if written is None else written, key_layout, source_state)
        read = self.query_widths.keys() | self.prior.read_names
        return {name: (features if name in read else others)[name] for name in features}, tdc, tdc_source

    def _condition(
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The joint projection of one stream, scaled by the conditioning and taken apart by name."""
        joint, tdc = self.in_proj(x), self.tdc
        if tdc is None:
            return dict(zip(self._names, joint.split(self._widths, dim=-1), strict=True)), state
        features, state = tdc(x, layout, state)
        parts = modulated_split(joint, tdc.out_proj(features), self._widths)
        return dict(zip(self._names, parts, strict=True)), state

    def _read(
        self,
        mixed: Float[Tensor, "B H T N V"],
        beta: Float[Tensor, "G V"] | None,
        features: Mapping[str, Tensor],
        gate: Float[Tensor, "B T H V"] | None,
    ) -> Float[Tensor, "B T H V"]:
        c = self.config
        if beta is not None and len(beta) != c.n_heads:
            beta = beta.repeat_interleave(c.n_heads // len(beta), dim=0)
        inner, outer = features.get("inner"), features.get("outer")
        return gated_read(mixed.transpose(1, 2), beta, inner, outer, gate, eps=c.eps)

    def _check_context(
        self,
        x: Tensor,
        context: Tensor,
        cu_seqlens: Tensor | None,
        state: MixerState | None,
        source: Tensor | None,
    ) -> None:
        c = self.config
        excluded = {"cu_seqlens": cu_seqlens, "state": state, "source": source}
        given = [name for name, value in excluded.items() if value is not None]
        if c.prior != "softmax" or c.causal or given:
            raise ValueError(
                "context: cross-attention needs prior='softmax', causal=False and no cu_seqlens, state or source, got "
                f"prior={c.prior!r}, causal={c.causal}, {', '.join(given) or 'none of them'} given"
            )
        self._check_width("x", x)
        self._check_width("context", context)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context: wanted {x.shape[0]} rows as x has, got {context.shape[0]}")
