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


def _running_max(k: Tensor, start: Tensor | None, reset: Tensor | None) -> Tensor:
    """Largest key of the sequence so far, at every step; a reset forgets the keys before it."""
    floor = torch.finfo(k.dtype).min  # finite, so that a row without any weight subtracts to 0 and not to NaN
    top = k.clamp_min(floor)
    segment = None if reset is None else reset.cumsum(1).unsqueeze(-1)
    if start is not None:
        first = torch.maximum(top[:, :1], start.unsqueeze(1))
        first = first if segment is None else torch.where(segment[:, :1] == 0, first, top[:, :1])
        top = torch.cat([first, top[:, 1:]], 1)
    if segment is None:
        return top.cummax(1).values
    span = 1
    while span < k.shape[1]:
        earlier = F.pad(top[:, :-span], (0, 0, span, 0), value=floor)
        same = F.pad(segment[:, :-span], (0, 0, span, 0), value=-1) == segment
        top, span = torch.where(same, torch.maximum(top, earlier), top), 2 * span
    return top


def _plain(
    k: Tensor, signals: Tensor, start: Tensor | None, sums: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages, last sums and running maximum, which is a constant to the gradient."""
    with torch.no_grad():  # and detached: forward mode does not mind no_grad
        start = None if start is None else start.detach()
        top = _running_max(k.detach(), start, reset)
        before = F.pad(top[:, :-1], (0, 0, 1, 0), value=-torch.inf)
        if start is not None:
            before = torch.cat([start.unsqueeze(1), top[:, :-1]], dim=1)
        decay = (before - top).exp()
        if reset is not None:
            decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    averaged, last = _averages(k, signals, top, decay, sums)
    return averaged, last, top


def _averages(
    k: Tensor, signals: Tensor, top: Tensor, decay: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    weight = (k - top).exp().unsqueeze(2)
    sums = plain_scan(decay, torch.cat([weight * signals, weight], dim=2), start)
    signal, total = sums.split([signals.shape[2], 1], dim=2)
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
    wide, by_kernel = signals.to(compute), kernels.usable("rnn_softmax", k, signals)
    if state is None and (by_kernel or num_steps == 0):
        state = RNNSoftmaxState(
            max=k.new_full((batch, width), -torch.inf, dtype=compute),
            sums=k.new_zeros((batch, num_signals + 1, width), dtype=compute),
        )
    if num_steps == 0:
        assert state is not None
        return signals, state
    start, before = (None, None) if state is None else (state.max.to(compute), state.sums.to(compute))
    if by_kernel:
        keys = k if k.dtype == torch.bfloat16 and compute == torch.float32 else k.to(compute)
        averaged, sums, top, _ = torch.ops.helmholtz.rnn_softmax(keys, wide, start, before, reset)
    else:
        averaged, sums, top = _plain(k.to(compute), wide, start, before, reset)
    last = F.threshold(top[:, -1], torch.finfo(compute).min, -torch.inf)
    return averaged.to(signals.dtype), RNNSoftmaxState(max=last, sums=sums)
