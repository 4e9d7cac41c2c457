"""The recurrences in float64, one token after another, as their equations stand."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def _restart(state: Tensor, reset: Tensor, empty: float = 0.0) -> Tensor:
    """``state`` with the rows of the batch that start a sequence here set to ``empty``."""
    return torch.where(reset.view(-1, *[1] * (state.ndim - 1)), torch.full_like(state, empty), state)


def _resets(reset: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """``reset`` per step; never by default."""
    if reset is None:
        reset = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    return reset.unbind(1)


def first_order_scan(
    decay: Float[Tensor, "B T C"],
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """``h_t = decay_t h_{t-1} + x_t``."""
    decay, x = decay.double(), x.double()
    h = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.double()
    out = []
    for a, b, r in zip(decay.unbind(1), x.unbind(1), _resets(reset, x), strict=True):
        h = a * _restart(h, r) + b
        out.append(h)
    return torch.stack(out, dim=1), h


def leaky_scan(
    rate: Float[Tensor, "B T C"],
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """``h_t = h_{t-1} / (1 + e^{rate_t}) + x_t`` where the mask is True, else ``h_{t-1}``."""
    decay, x = 1 / (1 + rate.double().exp()), x.double()
    if mask is not None:
        decay, x = torch.where(mask[..., None], decay, 1), torch.where(mask[..., None], x, 0)
    return first_order_scan(decay, x, state=state, reset=reset)


def linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """``S_t = diag(e^{log_decay_t}) S_{t-1} + k_t v_t^T`` and ``out_t = S_t^T q_t``."""
    q, k, v = q.double(), k.double(), v.double()
    log_decay = torch.zeros_like(k) if log_decay is None else log_decay.double()
    if log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    total = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.double()
    out = []
    steps = zip(*(x.unbind(2) for x in (q, k, v, log_decay)), _resets(reset, k.transpose(1, 2)), strict=True)
    for q_t, k_t, v_t, g_t, r in steps:
        total = g_t.exp().unsqueeze(-1) * _restart(total, r) + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q_t, total))
    return torch.stack(out, dim=2), total


def linear_average(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V1"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V1"]]:
    """``linear_attention`` over that of ones."""
    sums, last = linear_attention(q, k, F.pad(v, (0, 1), value=1.0), log_decay, state=state, reset=reset)
    return sums[..., :-1] / sums[..., -1:], last


def rnn_softmax(
    k: Float[Tensor, "B T C"],
    signals: Float[Tensor, "B T S C"],
    *,
    state: tuple[Float[Tensor, "B C"], Float[Tensor, "B S1 C"]] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S C"], tuple[Float[Tensor, "B C"], Float[Tensor, "B S1 C"]]]:
    """Sums of ``e^{k_i} [x_i, 1]`` merged as ``(m, S) + (m', S') = (mx, S e^{m - mx} + S' e^{m' - mx})``.

    The state is ``(largest key, sums)`` and the largest key is a constant to the gradient.
    """
    k, signals = k.double(), signals.double()
    rows = torch.cat([signals, torch.ones_like(signals[:, :, :1])], dim=2)
    if state is None:
        top, sums = torch.full_like(rows[:, 0, 0], -torch.inf), torch.zeros_like(rows[:, 0])
    else:
        top, sums = (x.double() for x in state)
    out = []
    for k_t, row, r in zip(k.unbind(1), rows.unbind(1), _resets(reset, k), strict=True):
        top, sums = _restart(top, r, -torch.inf), _restart(sums, r)
        new = torch.maximum(top, k_t).detach()
        shift = torch.where(new.isinf(), 0.0, new)  # no weight yet: every exponential below is 0
        sums = sums * (top - shift).exp().unsqueeze(1) + row * (k_t - shift).exp().unsqueeze(1)
        top = new
        weight = sums[:, -1:]
        out.append(sums[:, :-1] / torch.where(weight > 0, weight, torch.ones_like(weight)))
    return torch.stack(out, dim=1), (top, sums)


def selective_scan(
    u: Float[Tensor, "B T S C"],
    delta: Float[Tensor, "B T C"],
    A: Float[Tensor, "C N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "C"] | None = None,
    *,
    state: Float[Tensor, "B S C N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S C"], Float[Tensor, "B S C N"]]:
    """``h_t = e^{delta_t A} h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t . h_t + D u_t``."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    skip = torch.zeros_like(A[:, 0]) if D is None else D.double()
    h = u.new_zeros(u.shape[0], u.shape[2], *A.shape) if state is None else state.double()
    out = []
    steps = zip(*(x.unbind(1) for x in (u, delta, B, C)), _resets(reset, delta), strict=True)
    for u_t, delta_t, b_t, c_t, r in steps:
        decay = (delta_t.unsqueeze(-1) * A).exp().unsqueeze(1)
        step = torch.einsum("bc,bn,bsc->bscn", delta_t, b_t, u_t)
        h = decay * _restart(h, r) + step
        out.append(torch.einsum("bn,bscn->bsc", c_t, h) + skip * u_t)
    return torch.stack(out, dim=1), h


def selective_average(
    u: Float[Tensor, "B T S H V"],
    delta: Float[Tensor, "B T C"],
    A: Float[Tensor, "C N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "C"],
    *,
    state: Float[Tensor, "B S1 C N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T S H V"], Float[Tensor, "B S1 C N"]]:
    """``selective_scan`` over that of ones; channels are those of H heads."""
    x = torch.cat([u.flatten(3), torch.ones_like(u.flatten(3)[:, :, :1])], dim=2)
    y, last = selective_scan(x, delta, A, B, C, D, state=state, reset=reset)
    return (y[:, :, :-1] / y[:, :, -1:]).unflatten(3, u.shape[3:]), last


def ssd(
    x: Float[Tensor, "B T H P"],
    delta: Float[Tensor, "B T H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "H"] | None = None,
    *,
    state: Float[Tensor, "B H P N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    strict: bool = False,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """``h_t = e^{delta_t A} h_{t-1} + delta_t x_t B_t^T`` and ``y_t = h_t C_t + D x_t``.

    With ``strict``, ``y`` reads ``e^{delta_t A} h_{t-1}`` in place of ``h_t``.
    """
    x, delta, A, B, C = (z.double() for z in (x, delta, A, B, C))
    skip = torch.zeros_like(A) if D is None else D.double()
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[2]) if state is None else state.double()
    out = []
    steps = zip(*(z.unbind(1) for z in (x, delta, B, C)), _resets(reset, delta), strict=True)
    for x_t, delta_t, b_t, c_t, r in steps:
        step = torch.einsum("bh,bhp,bn->bhpn", delta_t, x_t, b_t)
        past = (delta_t * A).exp()[..., None, None] * _restart(h, r)
        h = past + step
        out.append(torch.einsum("bhpn,bn->bhp", past if strict else h, c_t) + skip.unsqueeze(-1) * x_t)
    return torch.stack(out, dim=1), h


def causal_conv(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, "C"] | None = None,
    *,
    state: Float[Tensor, "B W1 C"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W1 C"]]:
    """``y_t = bias + sum_w weight_w window_tw`` over the last W real tokens of a sequence; 0 at pads."""
    x, weight = x.double(), weight.double()
    shift = torch.zeros_like(weight[:, 0]) if bias is None else bias.double()
    window = x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2]) if state is None else state.double()
    mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    out = []
    for x_t, m, r in zip(x.unbind(1), mask.unbind(1), _resets(reset, x), strict=True):
        window = _restart(window, r)
        real = m.view(-1, 1, 1)
        grown = torch.cat([window, x_t.unsqueeze(1)], dim=1)
        out.append(torch.where(real[:, 0], torch.einsum("bwc,cw->bc", grown, weight) + shift, 0.0))
        window = torch.where(real, grown[:, 1:], window)
    return torch.stack(out, dim=1), window
