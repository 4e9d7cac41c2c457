"""The Free Energy Mixer: an attention replacement that reads values between their mean and their maximum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.init import init_normal
from helmholtz.layers.priors import AbstractPrior, LinearPrior, MambaPrior, RNNSoftmaxPrior, SoftmaxPrior
from helmholtz.layers.priors.base import split_heads
from helmholtz.layers.row_draws import RowDropout
from helmholtz.layers.sequence import SequenceLayout, sequence_layout
from helmholtz.layers.time_decay_conv import TimeDecayConditioning
from helmholtz.ops.free_energy import tilt_values
from helmholtz.ops.gated_read import gated_read, outer_gate
from helmholtz.ops.modulation import modulated_linear


@dataclass(frozen=True, slots=True)
class MixerState:
    """What a mixer remembers of the tokens it has seen; of constant size for every prior but softmax."""

    position: Int[Tensor, "B"]
    """Real tokens each row has seen."""
    prior: Any
    """State of the prior: a ``KVCache``, sums, or None before the first token."""
    tdc: Float[Tensor, "B W"] | None
    """State of the time-decay conditioning."""


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
        assert c.n_kv_heads is not None and c.d_head_v is not None and c.tdc_width is not None
        self.prior = _build_prior(c)
        width = c.n_heads * c.d_head_v
        self.query_widths = dict(self.prior.query_widths)
        if c.read == "temperature":
            self.query_widths["inner"] = width
        if c.outer_gate:
            self.query_widths["outer"] = width
        self.key_widths = {**self.prior.key_widths, "v": c.n_kv_heads * c.d_head_v}
        projected = sum(self.query_widths.values()) + sum(self.key_widths.values())
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
        """Weights N(0, 0.02), biases 0; the conditioning's output 0, so that it starts without effect."""
        init_normal(self)
        if self.tdc is not None:
            nn.init.zeros_(self.tdc.out_proj.weight)

    @property
    def beta_max(self) -> Float[Tensor, "G V"]:
        """Inverse temperature of the free-energy branch, in 1/units of the values."""
        c = self.config
        if c.read == "temperature":
            return F.softplus(self.theta.to(torch.promote_types(self.theta.dtype, torch.float32))) + c.eps
        assert c.n_kv_heads is not None and c.d_head_v is not None
        return torch.ones(c.n_kv_heads, c.d_head_v, device=self.o_proj.weight.device)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        context: Float[Tensor, "_ S _"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        context_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix a whole sequence.

        Args:
            context: what is read, in place of ``x`` (cross-attention): softmax prior, ``causal=False``.
                The conditioning runs over ``x`` for queries and gates, over ``context`` for keys and values.
            attention_mask: bool or integer, non-zero where a token is real; any pattern.
            context_mask: the same for ``context``.
            cu_seqlens: bounds of sequences packed end to end in one row.

        Raises: ValueError naming the argument for a shape, dtype or combination that cannot be mixed.
        """
        self._check_width("x", x)
        layout = sequence_layout(x, attention_mask, cu_seqlens)
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask: there is no context to mask")
            return self._mix(x, None, layout, layout, None)[0]
        self._check_context(x, context, cu_seqlens)
        return self._mix(x, context, layout, sequence_layout(context, context_mask), None)[0]

    def init_state(self, batch_size: int) -> MixerState:
        """The state before the first token. Raises: ValueError if the mixer is not causal."""
        if not self.config.causal:
            raise ValueError("init_state: a mixer with causal=False has no stream; call forward")
        weight = self.in_proj.weight
        position = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return MixerState(position, self.prior.init_state(batch_size, weight), None)

    def extend(
        self, x: Float[Tensor, "B T D"], state: MixerState, layout: SequenceLayout
    ) -> tuple[Float[Tensor, "B T D"], MixerState]:
        """Mix one or many further tokens; any split of a sequence into steps equals ``forward``."""
        self._check_width("x", x)
        if not self.config.causal:
            raise ValueError("step: a mixer with causal=False reads the whole sequence at once; call forward")
        return self._mix(x, None, layout, layout, state)

    def project(
        self, x: Float[Tensor, "B T D"], layout: SequenceLayout
    ) -> tuple[Mapping[str, Float[Tensor, "B T _"]], Float[Tensor, "B G T V"]]:
        """``(features by name, values)`` as the prior and the gates see them: for looking inside."""
        features, _ = self._project(x, None, layout, layout, None)
        return features, split_heads(features["v"], self.config.n_kv_heads or 0)

    def _mix(
        self,
        x: Tensor,
        context: Tensor | None,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: MixerState | None,
    ) -> tuple[Tensor, MixerState]:
        features, tdc_state = self._project(
            x, context, layout, key_layout, None if state is None else state.tdc
        )
        values = split_heads(features["v"], self.config.n_kv_heads or 0)
        prior_state = None if state is None else state.prior
        mixed, prior_state = self.prior.mix(features, values, self._tilt, layout, key_layout, prior_state)
        read = self._read(mixed, features).flatten(2)
        gate = self.prior.output_gate(features, layout)
        if gate is not None:
            read = read * gate
        y = self.dropout(self.o_proj(read.to(features["v"].dtype)))
        if layout.mask is not None:
            y = y.masked_fill(~layout.mask.unsqueeze(-1), 0)
        position = layout.advance(torch.zeros(x.shape[0], dtype=torch.long, device=x.device))
        return y, MixerState(position if state is None else state.position + position, prior_state, tdc_state)

    def _project(
        self,
        x: Tensor,
        context: Tensor | None,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        tdc_state: Tensor | None,
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """Every pre-activation by name, each scaled by the conditioning."""
        if context is None:
            return self._condition(
                x, {**self.query_widths, **self.key_widths}, slice(None), layout, tdc_state
            )
        border = sum(self.query_widths.values())
        query, _ = self._condition(x, self.query_widths, slice(None, border), layout, None)
        key, _ = self._condition(context, self.key_widths, slice(border, None), key_layout, None)
        return {**query, **key}, None

    def _condition(
        self, x: Tensor, widths: dict[str, int], rows: slice, layout: SequenceLayout, state: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        if layout.mask is not None:
            x = x.masked_fill(~layout.mask.unsqueeze(-1), 0)
        sizes = list(widths.values())
        weight, bias = (
            self.in_proj.weight[rows],
            None if self.in_proj.bias is None else self.in_proj.bias[rows],
        )
        if self.tdc is None:
            parts = F.linear(x, weight, bias).split(sizes, dim=-1)
        else:
            features, state = self.tdc(x, layout, state)
            parts = modulated_linear(x, weight, bias, features, self.tdc.out_proj.weight[rows], sizes)
        return dict(zip(widths, parts, strict=True)), state

    def _tilt(self, values: Tensor) -> Tensor:
        """The signals that the prior averages."""
        if self.config.read == "mean":
            return values.unsqueeze(-2)
        return tilt_values(values, self.beta_max, cap=self.config.cap)

    def _read(
        self, mixed: Float[Tensor, "B H T N V"], features: Mapping[str, Tensor]
    ) -> Float[Tensor, "B T H V"]:
        c, mixed = self.config, mixed.transpose(1, 2)
        inner, outer = (
            features[name].unflatten(-1, (c.n_heads, -1)) if name in features else None
            for name in ("inner", "outer")
        )
        if c.read == "mean":
            read = mixed.squeeze(-2)
            return read if outer is None else read * outer_gate(outer.to(read.dtype), eps=c.eps)
        beta = self.beta_max.repeat_interleave(c.n_heads // self.beta_max.shape[0], dim=0)
        return gated_read(mixed, beta, inner, outer, eps=c.eps)

    def _check_width(self, name: str, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"{name}: wanted shape (B, T, d_model={self.config.d_model}), got {tuple(x.shape)}"
            )

    def _check_context(self, x: Tensor, context: Tensor, cu_seqlens: Tensor | None) -> None:
        c = self.config
        if c.prior != "softmax" or c.causal or cu_seqlens is not None:
            raise ValueError(
                "context: cross-attention needs prior='softmax', causal=False and no cu_seqlens, got "
                f"prior={c.prior!r}, causal={c.causal}, cu_seqlens={'given' if cu_seqlens is not None else None}"
            )
        self._check_width("context", context)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context: wanted {x.shape[0]} rows as x has, got {context.shape[0]}")


def _build_prior(c: FreeEnergyMixerConfig) -> AbstractPrior:
    if c.prior == "mamba":
        assert c.d_state is not None and c.d_head_v is not None
        return MambaPrior(
            width=c.n_heads * c.d_head_v,
            n_heads=c.n_heads,
            d_state=c.d_state,
            causal=c.causal,
            normalize=c.normalize,
            eps=c.eps,
        )
    assert (
        c.d_head is not None
        and c.rope_theta is not None
        and c.n_kv_heads is not None
        and c.d_head_v is not None
    )
    if c.prior == "rnn_softmax":
        return RNNSoftmaxPrior(
            n_heads=c.n_heads, d_head=c.d_head, rope_theta=c.rope_theta, causal=c.causal, eps=c.eps
        )
    if c.prior == "softmax":
        return SoftmaxPrior(
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            d_head=c.d_head,
            d_head_v=c.d_head_v,
            rope_theta=c.rope_theta,
            causal=c.causal,
            backend=c.backend,
        )
    return LinearPrior(
        n_heads=c.n_heads,
        d_head=c.d_head,
        rope_theta=c.rope_theta,
        causal=c.causal,
        backend=c.backend,
        eps=c.eps,
        decay=c.decay,
    )
