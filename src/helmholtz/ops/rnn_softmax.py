"""Softmax over time as a recurrence: one key per channel, no query."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.scan import scan_in_place


@dataclass(frozen=True, slots=True)
class RNNSoftmaxState:
    r"""Sums over the past, in units of :math:`e^{m}` with :math:`m` the largest key so far.

    States of neighbouring spans merge as :math:`(\max(m, m'),\ S e^{m - \max} + S' e^{m' - \max})`. Only
    :math:`S e^m` has a meaning: ``max`` carries no gradient, ``sums`` is differentiated at fixed ``max``.
    """

    max: Float[Tensor, "B C"]
    """Largest key so far; ``-inf`` before the first."""
    sums: Float[Tensor, "B S1 C"]
    """Weighted sums of the signals; the last row is the sum of the weights."""


def _running_max(k: Tensor, start: Tensor, reset: Tensor | None) -> Tensor:
    """Largest key of the sequence so far, at every step; a reset forgets the keys before it."""
    floor = torch.finfo(k.dtype).min  # finite, so that a row without any weight subtracts to 0 and not to NaN
    k, running = k.clamp_min(floor), start.clamp_min(floor)
    out = torch.empty_like(k)
    resets = [None] * k.shape[1] if reset is None else reset.unsqueeze(-1).unbind(1)
    for key, here, restart in zip(k.unbind(1), out.unbind(1), resets, strict=True):
        if restart is not None:
            running = running.masked_fill(restart, floor)
        running = torch.maximum(key, running, out=here)
    return out


class _RNNSoftmax(DifferentiableOnce):
    """Averages and final sums from shifted weights ``w = e^{k - m}`` and decays ``e^{m_{t-1} - m_t}``."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, signals: Tensor, start: Tensor, top: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight = (k - top).exp_().unsqueeze(2)
        sums = signals.new_empty((*signals.shape[:2], signals.shape[2] + 1, signals.shape[3]))
        torch.mul(weight, signals, out=sums[:, :, :-1])
        sums[:, :, -1:] = weight
        last = scan_in_place(decay, sums, start).clone()
        total = sums[:, :, -1:]
        inverse = torch.where(total > 0, total.reciprocal(), 0)
        averaged = sums[:, :, :-1] * inverse
        ctx.save_for_backward(weight, signals, decay, inverse, averaged)
        return averaged, last

    @staticmethod
    def backward(ctx: Any, daveraged: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        weight, signals, decay, inverse, averaged = ctx.saved_tensors
        dsums = dlast.new_empty((len(dlast), averaged.shape[1], *dlast.shape[1:]))
        torch.mul(daveraged, inverse, out=dsums[:, :, :-1])
        torch.sum(dsums[:, :, :-1] * averaged, dim=2, keepdim=True, out=dsums[:, :, -1:]).neg_()
        dsums[:, -1] += dlast
        scan_in_place(decay[:, 1:], dsums[:, :-1], dsums[:, -1], reverse=True)
        dstart = dsums[:, 0] * decay[:, 0]
        dsums *= weight
        dk = (dsums[:, :, :-1] * signals).sum(2) + dsums[:, :, -1]
        return dk, dsums[:, :, :-1], dstart, None, None


def rnn_softmax(
    k: Float[Tensor, "B T C"],
    signals: Float[Tensor, "B T S C"],
    *,
    state: RNNSoftmaxState | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S C"], RNNSoftmaxState]:
    r"""Average every signal over the past with weights :math:`e^{k_i}` per channel.

    .. math:: y_{t,s} = \frac{\sum_{i \le t} e^{k_i}\, x_{i,s}}{\sum_{i \le t} e^{k_i}}

    With the running maximum :math:`m_t = \max_{i \le t} k_i`, numerator and denominator are both a
    first-order recurrence with decay :math:`e^{m_{t-1} - m_t} \le 1` and input :math:`e^{k_t - m_t} x_t`.
    Both carry the factor :math:`e^{-m_t}`, which cancels in the quotient whatever :math:`m` is: the derivative
    through :math:`m` is 0, so :math:`m` is a constant to the gradient.

    Args:
        k: keys in nats; ``-inf`` is weight 0 (a pad). Must not be ``+inf``.
        state: what an earlier call returned.
        reset: where True, the step starts a new sequence.

    Returns:
        ``(averaged, state)``. Where every weight so far is 0 the average is 0 and so is its gradient.

    Accuracy:
        Computed in at least float32. The sum of weights is at least 1 wherever it is not 0, for any keys;
        no future key enters, so the past is the same bit for bit.

    Cost:
        Time and memory ``O(B T S C)``.

    Source: Zhai et al., "An Attention Free Transformer", 2021, in the causal form without position bias.
    """
    compute = compute_dtype(k, signals)
    batch, num_steps, num_signals, width = signals.shape
    if state is None:
        state = RNNSoftmaxState(
            max=k.new_full((batch, width), -torch.inf, dtype=compute),
            sums=k.new_zeros((batch, num_signals + 1, width), dtype=compute),
        )
    if num_steps == 0:
        return signals, state
    keys, start = k.to(compute), state.max.to(compute)
    with torch.no_grad():  # and detached: forward mode does not mind no_grad
        top = _running_max(keys.detach(), start.detach(), reset)
        before = torch.cat([start.unsqueeze(1), top[:, :-1]], dim=1)
        decay = (before - top).exp_()
        if reset is not None:
            decay.masked_fill_(reset.unsqueeze(-1), 0)
        last_max = torch.where(top[:, -1] > torch.finfo(compute).min, top[:, -1], -torch.inf)
    averaged, sums = _RNNSoftmax.call(
        keys, signals.to(compute), state.sums.to(compute), top, decay.unsqueeze(2)
    )
    return averaged.to(signals.dtype), RNNSoftmaxState(max=last_max, sums=sums)
