"""The free-energy read: a log-partition function of the values under a prior, per channel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check
from helmholtz.ops._average import check_queries, kernel_reads
from helmholtz.ops._compute import as_dtype, compute_dtype, full_precision
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.rope import rotate


def tilt_values(
    v: Float[Tensor, "B G T V"], beta: Float[Tensor, "G V"], *, cap: float, signals_first: bool = False
) -> Float[Tensor, "B G T 2 V"]:
    r"""The two signals that a prior averages for a free-energy read: :math:`v` and :math:`e^{\beta v}`.

    The exponent is clipped to ``[-cap, cap]`` nats, in the exponential signal alone: the mean stays linear in ``v``.
    Computed in at least float32.

    Args:
        signals_first: the kernel lays the signals out as ``B T 2 G V``, as recurrences over all heads at once want
            them; without it as ``B T G 2 V``, as attention does.
    """
    wide = compute_dtype(v)
    rates = beta.to(wide)
    if kernels.usable("tilt", v):
        signals: Tensor = torch.ops.helmholtz.tilt(v, rates, cap, signals_first)
        return signals
    v = v.to(wide)
    return torch.stack([v, F.hardtanh(rates.unsqueeze(1) * v, -cap, cap).exp()], dim=-2)


def free_energy_from_mixed(
    mixed: Float[Tensor, "B H T 2 V"], beta: Float[Tensor, "G V"]
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"]]:
    """``(mean, free)`` from the averages of ``tilt_values``, in their dtype.

    A row that saw nothing (both averages 0) gives ``(0, 0)`` with gradient 0: its logarithm is never taken.
    ``beta`` has one row per value head; heads of a group share it.
    """
    mean, partition = mixed.unbind(-2)
    beta = beta.to(mixed.dtype).repeat_interleave(mixed.shape[1] // beta.shape[0], dim=0)
    seen = torch.where(partition > 0, partition, 1.0)
    return mean, seen.log() / beta.unsqueeze(1)


def softmax_read(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    beta: Float[Tensor, "G V"],
    *,
    cap: float,
    causal: bool = True,
    key_mask: Bool[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, "n1"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H T 2 V"]:
    r"""Averages of ``tilt_values`` under the softmax of ``softmax_attention``, whose arguments it takes.

    Returns: at least float32, whatever the inputs are.
    Accuracy: products of bf16 are summed in float32, and the weights that they meet in bf16 sum to 1 as they are
        rounded: a free energy read from the averages is off by at most ``2^-8 (|F| + range of the visible v)`` for
        ``beta >= 1e-3``. Wider inputs as ``free_energy_read``.
    Cost: on a CPU one kernel of 3 products of ``T S K`` forward and 7 backward, which holds a block of signals at a
        time; elsewhere that of ``softmax_attention`` with the signals for values.
    """
    wide = compute_dtype(q, k, v)
    if not kernel_reads(q, k, v):
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if backend in ("auto", "torch") and kernel_reads(q, k, v):
        check_queries(q, k, causal)
        beta = beta.to(wide)
        read, _ = torch.ops.helmholtz.softmax_read(q, k, v, beta, key_mask, cu_seqlens, causal, cap)
        return read
    signals = tilt_values(v.to(wide), beta, cap=cap).flatten(-2)
    with full_precision(v.device):
        mixed = softmax_attention(
            q.to(wide),
            k.to(wide),
            signals,
            causal=causal,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
    return mixed.unflatten(-1, (2, -1))


def softmax_step(
    q: Float[Tensor, "B T HK"],
    k: Float[Tensor, "B T GK"],
    v: Float[Tensor, "B T GV"],
    beta: Float[Tensor, "G V"] | None,
    rotation: tuple[Tensor, Tensor] | tuple[None, None],
    keys: Float[Tensor, "B G C K"],
    values: Float[Tensor, "B G C V"],
    *,
    before: int,
    cap: float,
    key_mask: Bool[Tensor, "B S"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H T N V"]:
    """``softmax_read`` of the next T tokens of a stream, as ``attention_step``: their keys and values are written into
    the memory of a cache, behind those of ``before`` tokens.

    Args:
        q, k: not rotated.
        beta: None averages the values alone, N = 1.
        rotation: the ``rope_table`` of these tokens, or None twice: nothing is rotated.

    Returns: at least float32. No gradients, as memory is changed.
    Raises: ValueError if the memory is too short.
    """
    assert not torch.is_grad_enabled()
    wide = compute_dtype(q, k, v)
    known = q.dtype in kernels.STORED and q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype
    if known and backend in ("auto", "torch") and kernels.usable("softmax_step", q, keys):
        rates = as_dtype(beta, wide)
        read: Tensor = torch.ops.helmholtz.softmax_step(
            q, k, v, rates, *rotation, keys, values, key_mask, before, cap
        )
        return read
    time, (groups, room, width) = q.shape[1], keys.shape[1:]
    check(before + time <= room, "keys", tuple(keys.shape), f"memory for {before} + {time} tokens")
    q, k = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k))
    cos, sin = rotation
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    for memory, new in ((keys, k), (values, v.unflatten(-1, (groups, -1)).transpose(1, 2))):
        memory.narrow(2, before, time).copy_(new)
    keys, values = (memory.narrow(2, 0, before + time) for memory in (keys, values))
    if beta is None:
        mean = softmax_attention(q, keys.to(q.dtype), values.to(q.dtype), key_mask=key_mask, backend=backend)
        return mean.unsqueeze(-2).to(wide)
    return softmax_read(q, keys, values, beta, cap=cap, key_mask=key_mask, backend=backend)


def free_energy_read(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    beta: Float[Tensor, "G V"],
    *,
    cap: float = 40.0,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"]]:
    r"""Mean and free energy of the values under a causal softmax prior, in one attention pass.

    .. math:: \mu_t = \sum_{i \le t} p_t(i)\, v_i, \qquad
              F_t = \beta^{-1} \log \sum_{i \le t} p_t(i)\, e^{\mathrm{clip}(\beta v_i,\, \pm c)}

    Args:
        q, k: queries and keys. Scores are scaled by :math:`K^{-1/2}`.
        v: values, in the units of the output.
        beta: inverse temperature per value head and channel, in 1/units of ``v``; positive.
        cap: :math:`c`, the largest :math:`|\beta v|` in nats that enters the exponential.

    Returns:
        ``(mean, free)``, ``mean <= free <= max v`` up to rounding where no value was clipped.

    Accuracy:
        Computed in at least float32, one rounding to the dtype of ``v``. The prior is normalised, so the sum lies in
        ``[exp(-cap), exp(cap)]``: it neither overflows nor vanishes for ``cap <= 80``. Gradients hold ``exp(2 cap)``:
        for ``cap > 44`` they can overflow where the prior is far from the largest value. The absolute error of ``free``
        is below ``(8 + max|clip(beta v)|) eps / beta``: unlike the mean's, it grows as ``beta`` shrinks.

    Source: Lu & Yang, "Free Energy Mixer", ICLR 2026: free-energy read.
    Reference: ``helmholtz.reference.free_energy_read``.
    """
    wide = compute_dtype(v)
    beta = beta.to(wide)  # widened once: two casts would round its gradient twice
    mixed = softmax_read(q.to(wide), k.to(wide), v.to(wide), beta, cap=cap)
    mean, free = free_energy_from_mixed(mixed, beta)
    return mean.to(v.dtype), free.to(v.dtype)


def posterior(
    prior: Float[Tensor, "*batch S"], v: Float[Tensor, "*batch S"], beta: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch S"]:
    r"""Value-aware weights :math:`q(i) \propto p(i) e^{\beta v_i}`; tokens of prior weight 0 keep weight 0.

    Without any prior weight (a query that sees nothing) there is no posterior weight either.

    Source: Lu & Yang 2026, posterior selector.
    """
    nothing = (prior <= 0).all(-1, keepdim=True)
    logits = (prior.log() + beta.unsqueeze(-1) * v).masked_fill(nothing, 0.0)
    return logits.softmax(-1).masked_fill(nothing, 0.0)


class HiddenTemperature(NamedTuple):
    """What linearised temperature learning reads implicitly."""

    beta: Float[Tensor, "*batch"]
    """The unique ``beta*`` in ``[0, beta_max]`` with ``F(beta*) = (1 - lam) mean + lam F(beta_max)``; NaN where the
    values do not vary under the prior (then ``F`` is the mean at every temperature)."""
    value: Float[Tensor, "*batch"]
    """``F(beta*)``."""
    kl: Float[Tensor, "*batch"]
    """``KL(p || q_beta*)`` in nats: ``value = mean + kl / beta*``."""


@torch.no_grad()
def hidden_temperature(
    lam: Float[Tensor, "*batch"],
    prior: Float[Tensor, "*batch S"],
    v: Float[Tensor, "*batch S"],
    beta_max: Float[Tensor, "*batch"],
    *,
    num_steps: int = 60,
) -> HiddenTemperature:
    """Invert the linearised temperature: the one ``beta`` whose free energy equals the gated read. In float64, without
    gradient.

    ``F`` increases with ``beta`` wherever the values vary under the prior, so bisection finds it: the error halves in
    each of ``num_steps`` steps.

    Source: Lu & Yang 2026, linearised temperature learning (LTL). The equality is one of value, not of gradient.
    """
    lam, prior, v, beta_max = (x.double() for x in (lam, prior, v, beta_max))
    mean = (prior * v).sum(-1)
    target = torch.lerp(mean, _free_energy(prior, v, beta_max), lam)
    low, high = torch.zeros_like(beta_max), beta_max.clone()
    for _ in range(num_steps):
        middle = (low + high) / 2
        below = _free_energy(prior, v, middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    spread = (prior * (v - mean.unsqueeze(-1)).square()).sum(-1)
    scale = torch.finfo(torch.float64).eps * v.abs().amax(-1).clamp(min=1e-30)
    beta = torch.where(spread > scale.square(), (low + high) / 2, torch.nan)
    return HiddenTemperature(beta, target, torch.nan_to_num(beta) * (target - mean))


def _free_energy(prior: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """F(beta), shifted by the largest value; the mean at ``beta = 0``, its limit.

    Two forms of one logarithm: with ``expm1`` it holds for a small ``beta``, as a plain sum it holds where almost all
    of the prior lies far below the largest value.
    """
    top = torch.where(prior > 0, v, -torch.inf).amax(-1)
    exponent = torch.where(prior > 0, beta.unsqueeze(-1) * (v - top.unsqueeze(-1)), 0)
    missing = (prior * exponent.expm1()).sum(-1)
    near, far = torch.log1p(missing.clamp(min=-0.5)), (prior * exponent.exp()).sum(-1).log()
    tilted = top + torch.where(missing > -0.5, near, far) / torch.where(beta > 0, beta, 1.0)
    return torch.where(beta > 0, tilted, (prior * v).sum(-1))
