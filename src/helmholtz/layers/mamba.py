"""Selective state-space layers with one decay per head: the Mamba-2 mixer, and the bare recurrence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz._checks import check_divides, check_integer
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.init import init_weight
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.placement import device_of
from helmholtz.layers.sequence import SequenceLayout, zero_pads
from helmholtz.ops._compute import as_dtype, compute_dtype
from helmholtz.ops._recompute import recomputed
from helmholtz.ops.causal_conv import causal_conv
from helmholtz.ops.ssd import ssd

_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class MambaState:
    """What a mixer remembers: as much after a million tokens as before the first."""

    position: Int[Tensor, "B"]
    """Real tokens each row has seen."""
    conv: Float[Tensor, "B W1 C"] | None
    """The last real inputs of the convolution; None before the first token, as is the next."""
    ssm: Float[Tensor, "B H P N"] | None
    """The state of every head."""


class _StepSizes(nn.Module):
    r"""Rates :math:`A = -e^{A_{\log}} < 0` and step sizes :math:`\Delta = \mathrm{softplus}(d + b) > 0` of H heads.

    Starts with rates spread evenly over [1, 16] and step sizes drawn log-uniformly from [1e-3, 1e-1]: memories of
    about 1 to 1000 tokens. Computed in at least float32.

    Source: Gu & Dao, "Mamba", 2023, section 3.6; Dao & Gu, "Transformers are SSMs", 2024, section 7.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(1, 16, n_heads).log())
        delta = torch.empty(n_heads).uniform_(-3, -1).mul(torch.tensor(10.0).log()).exp()
        self.bias = nn.Parameter(delta + (-torch.expm1(-delta)).log())  # the inverse of softplus

    def forward(
        self, x: Float[Tensor, "B T H"], layout: SequenceLayout
    ) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "H"]]:
        """``(delta, A)``; delta is 0 at pads."""
        wide = compute_dtype(x, self.bias)
        delta = F.softplus(as_dtype(x, wide) + as_dtype(self.bias, wide))
        if layout.mask is not None:
            delta = delta.masked_fill(~layout.mask.unsqueeze(-1), 0)
        return delta, -as_dtype(self.A_log, wide).exp()


def _check_sizes(d_model: int, d_inner: int, d_state: int, d_head: int) -> None:
    for name, size in {"d_model": d_model, "d_inner": d_inner, "d_state": d_state}.items():
        check_integer(name, size)
    check_divides("d_head", d_head, "d_inner", d_inner)


def _check_width(name: str, x: Tensor, width: int) -> None:
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name}: wanted shape (B, T, d_model={width}), got {tuple(x.shape)}")


@torch.no_grad()
def _init_projection(projection: nn.Linear, n_heads: int) -> None:
    """Outputs of unit variance for inputs of unit mean square; the last of them, which become step sizes, by fan-in.

    Not all by fan-in, because three signals are multiplied into a read, ``v B C``: at unit variance it is not small.
    The short convolution, uniform to ``d_conv^(-1/2)``, brings its outputs to the variance 1/3 of all other mixers'.
    """
    if projection.weight.is_meta:
        return
    nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    init_weight(projection.weight[-n_heads:], projection.in_features)


class _Recomputed:
    """What the backward pass of a module needs may be computed again there instead of kept."""

    gradient_checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        """Recompute in the backward pass instead of keeping."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self.gradient_checkpointing = False

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, kept or recomputed."""
        return recomputed(function, *inputs) if self.gradient_checkpointing else function(*inputs)


@final
class MambaMixer(_Recomputed, AbstractMixer[MambaState]):
    r"""Mamba-2: a gated state-space model with a short convolution in front.

    .. math:: (g, s, d) = W_{in} x, \quad (u, B, C) = \mathrm{silu}(\mathrm{conv}(s)), \quad
              y = W_o\, \mathrm{RMSNorm}(\mathrm{ssd}(u, \Delta, A, B, C, D) \odot \mathrm{silu}(g))

    with :math:`\Delta = \mathrm{softplus}(d + b)`, :math:`A = -e^{A_{\log}}` per head. B and C serve all heads.

    Args:
        d_inner: channels of the state-space model.
        d_state: state per channel.
        d_conv: tokens that the convolution sees, the current one included.
        d_head: channels that share a decay; a divisor of ``d_inner``.

    Attributes:
        gradient_checkpointing: whether the backward pass recomputes the mixer from its input instead of keeping what it
            needs: the same gradients, a forward pass more, memory of ``B T D`` instead of about ``B T (6 d_inner)``.

    Cost: O(T) time; a streaming state of ``d_inner d_state + (d_conv - 1)(d_inner + 2 d_state)`` numbers per row.
    Raises: ValueError if ``d_head`` does not divide ``d_inner``.
    Source: Dao & Gu, "Transformers are SSMs", 2024, section 7.
    """

    def __init__(
        self, d_model: int, *, d_inner: int, d_state: int = 64, d_conv: int = 4, d_head: int = 64
    ) -> None:
        super().__init__()
        _check_sizes(d_model, d_inner, d_state, d_head)
        check_integer("d_conv", d_conv)
        self.d_model, self.n_heads, self.d_head = d_model, d_inner // d_head, d_head
        self.d_inner, self.d_state = d_inner, d_state
        self.causal = True
        filtered = d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, d_inner + filtered + self.n_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(filtered, d_conv).uniform_(-1, 1) * d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(filtered))
        self.step_sizes = _StepSizes(self.n_heads)
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(d_inner, eps=_NORM_EPS)
        self.o_proj = nn.Linear(d_inner, d_model, bias=False)
        _init_projection(self.in_proj, self.n_heads)
        init_weight(self.o_proj.weight, d_inner)

    def init_state(self, batch_size: int) -> MambaState:
        return MambaState(self._start(batch_size, device_of(self)), None, None)

    def _mix(
        self,
        x: Float[Tensor, "#B #T D"],
        source: Float[Tensor, "B T D"] | None,
        layout: SequenceLayout,
        state: MambaState | None,
    ) -> tuple[Float[Tensor, "B T D"], MambaState | None]:
        if source is not None:
            x = x.expand_as(source)
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        y, conv, ssm = self._call(self._scan, x, source, conv, ssm, layout)
        # what a layout remembers of a position would be another graph for every block
        after = None if state is None else MambaState(layout.advance(state.position), conv, ssm)
        return y, after

    def _scan(
        self,
        x: Tensor,
        source: Tensor | None,
        conv: Tensor | None,
        ssm: Tensor | None,
        layout: SequenceLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, state of the convolution, state of the heads)``."""
        gate, signal, step = self._project(x)
        if source is not None:  # of x stay C, the last channels of the signal, and the gate
            _, written, step = self._project(source)
            signal = torch.cat([written[..., : -self.d_state], signal[..., -self.d_state :]], dim=-1)
        signal, conv = causal_conv(
            signal,
            self.conv_weight,
            self.conv_bias,
            state=conv,
            mask=layout.mask,
            reset=layout.reset,
            activation="silu",
        )
        u, b, c = signal.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        delta, rates = self.step_sizes(step, layout)
        shape = (*u.shape[:2], self.n_heads, self.d_head)
        heads, gate = u.view(shape), gate.view(shape)
        read, ssm = ssd(heads, delta, rates, b, c, self.D, gate=gate, state=ssm, reset=layout.reset)
        return self.o_proj(self.norm(read.flatten(2))), conv, ssm

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        widths = [self.d_inner, self.d_inner + 2 * self.d_state, self.n_heads]
        joint: Tensor = self.in_proj(x)
        return joint.split(widths, dim=-1)


@final
class MambaCell(_Recomputed, nn.Module):
    r"""The recurrence alone: what it would answer to a token's input, as a past and a gain, with the input left open.

    From the context :math:`c` come :math:`(v, B, C, d) = W c` and :math:`\Delta = \mathrm{softplus}(d + b)`; the state
    is :math:`h_t = e^{\Delta_t A} h_{t-1} + \Delta_t v_t B_t^\top` and

    .. math:: \mathrm{past}_t = (e^{\Delta_t A} h_{t-1})\, C_t, \qquad
              \mathrm{gain}_t = 1 - e^{-\Delta_t\, \mathrm{softplus}(B_t \cdot C_t)} \in [0, 1).

    The gain is a bounded surrogate of a step's own, :math:`\Delta_t\, B_t \cdot C_t`. It is 0 at pads, as is the past.

    Args:
        d_inner: channels E of past and gain.
        d_state: state per channel.
        d_head: channels that share a decay and a gain; a divisor of ``d_inner``.

    Raises: ValueError if ``d_head`` does not divide ``d_inner``.
    Source: the recurrence of Dao & Gu, "Transformers are SSMs", 2024, eq. 1 and section 7.
    """

    def __init__(self, d_model: int, *, d_inner: int, d_state: int = 64, d_head: int = 64) -> None:
        super().__init__()
        _check_sizes(d_model, d_inner, d_state, d_head)
        self.d_model, self.n_heads, self.d_head = d_model, d_inner // d_head, d_head
        self.d_inner, self.d_state = d_inner, d_state
        self.in_proj = nn.Linear(d_model, d_inner + 2 * d_state + self.n_heads, bias=False)
        self.step_sizes = _StepSizes(self.n_heads)
        _init_projection(self.in_proj, self.n_heads)

    def forward(
        self,
        c: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        state: Float[Tensor, "B H P N"] | None = None,
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B T E"], Float[Tensor, "B H P N"]]:
        """``(past, gain, state)`` in at least float32.

        Args:
            state: what an earlier call returned; zeros by default.
        """
        _check_width("c", c, self.d_model)
        result: tuple[Tensor, Tensor, Tensor] = self._call(self._scan, c, layout, state)
        return result

    def _scan(self, c: Tensor, layout: SequenceLayout, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.d_inner, self.d_state, self.d_state, self.n_heads]
        v, write, read, step = self.in_proj(zero_pads(c, layout)).split(widths, dim=-1)
        delta, rates = self.step_sizes(step, layout)
        v, write, read = (x.to(delta.dtype) for x in (v, write, read))
        heads = v.unflatten(-1, (self.n_heads, self.d_head))
        past, state = ssd(heads, delta, rates, write, read, state=state, reset=layout.reset, strict=True)
        own = F.softplus((write * read).sum(-1, keepdim=True))
        gain = -torch.expm1(-delta * own)
        return zero_pads(past.flatten(2), layout), gain.repeat_interleave(self.d_head, dim=-1), state
