"""Softmax over time as a recurrence: one key per channel, no query."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.scan import plain_scan


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
    top, before = k.clamp_min(floor), start.clamp_min(floor).unsqueeze(1)
    if reset is None:
        return torch.maximum(top.cummax(1).values, before)
    segment = reset.cumsum(1).unsqueeze(-1)
    top = torch.where(segment[:, :1] == 0, torch.cat([torch.maximum(top[:, :1], before), top[:, 1:]], 1), top)
    span = 1
    while span < k.shape[1]:
        earlier = F.pad(top[:, :-span], (0, 0, span, 0), value=floor)
        same = F.pad(segment[:, :-span], (0, 0, span, 0), value=-1) == segment
        top, span = torch.where(same, torch.maximum(top, earlier), top), 2 * span
    return top


def _plain(
    k: Tensor, signals: Tensor, start: Tensor, sums: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages, last sums and running maximum, which is a constant to the gradient."""
    with torch.no_grad():  # and detached: forward mode does not mind no_grad
        top = _running_max(k.detach(), start.detach(), reset)
        before = torch.cat([start.detach().unsqueeze(1), top[:, :-1]], dim=1)
        decay = (before - top).exp()
        if reset is not None:
            decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    averaged, last = _averages(k, signals, top, decay, sums)
    return averaged, last, top


def _averages(k: Tensor, signals: Tensor, top: Tensor, decay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    weight = (k - top).exp().unsqueeze(2)
    sums = plain_scan(decay, torch.cat([weight * signals, weight], dim=2), start)
    signal, total = sums[:, :, :-1], sums[:, :, -1:]
    return signal / F.threshold(total, 0, 1), sums[:, -1]  # without any weight the signals are 0


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
    others = signals.to(compute), state.max.to(compute), state.sums.to(compute)
    if kernels.usable(k, *others):
        keys = k if k.dtype == torch.bfloat16 and compute == torch.float32 else k.to(compute)
        averaged, sums, top, _ = torch.ops.helmholtz.rnn_softmax(keys, *others, reset)
    else:
        averaged, sums, top = _plain(k.to(compute), *others, reset)
    last = top[:, -1]
    last = torch.where(last > torch.finfo(compute).min, last, -torch.inf)
    return averaged.to(signals.dtype), RNNSoftmaxState(max=last, sums=sums)
