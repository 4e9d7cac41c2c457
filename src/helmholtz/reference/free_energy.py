"""Attention, rotation and the free-energy read in float64, one query at a time, from the equations."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Zhang & Sennrich 2019, eq. 4."""
    x, weight = x.double(), weight.double()
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu(gate_up: Tensor) -> Tensor:
    """Shazeer 2020, eq. 6, without the matrices."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def rope(x: Float[Tensor, "B H T K"], positions: Int[Tensor, "B T"], *, theta: float = 10000.0) -> Tensor:
    """Pairs (i, i + K/2) as complex numbers, multiplied by exp(1j position theta^(-2i/K))."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angle = positions.double()[:, None, :, None] * frequency
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax_weights(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    *,
    causal: bool = True,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H T S"]:
    """p_t(i) of scaled dot products over the visible keys; all zeros where none is visible."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    weights = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            seen = [
                i
                for i in range(k.shape[2])
                if (not causal or i <= t + k.shape[2] - q.shape[2])
                and (key_mask is None or bool(key_mask[b, i]))
            ]
            if seen:
                scores = torch.einsum("hk,hik->hi", q[b, :, t], k[b][:, seen]) / math.sqrt(q.shape[-1])
                row = torch.zeros(q.shape[1], k.shape[2], dtype=torch.float64)
                weights[b, :, t] = row.index_copy(1, torch.tensor(seen), scores.softmax(-1))
    return weights


def softmax_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool = True,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """sum_i p_t(i) v_i."""
    weights = softmax_weights(q, k, causal=causal, key_mask=key_mask)
    return torch.einsum(
        "bhti,bhiv->bhtv", weights, v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    )


def softmax_read(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    beta: Float[Tensor, "G V"],
    *,
    cap: float,
    causal: bool = True,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H T 2 V"]:
    """sum_i p_t(i) v_i and sum_i p_t(i) exp(clip(beta v_i))."""
    tilted = (beta.double().unsqueeze(1) * v.double()).clamp(-cap, cap).exp()
    averages = [
        softmax_attention(q, k, signal, causal=causal, key_mask=key_mask) for signal in (v.double(), tilted)
    ]
    return torch.stack(averages, dim=-2)


def rotary_attention(
    joint: Float[Tensor, "B T N K"],
    positions: Int[Tensor, "B T"],
    heads: int,
    groups: int,
    *,
    causal: bool = True,
) -> Float[Tensor, "B T HK"]:
    """Attention of heads that lie side by side; queries and keys are rotated by their positions."""
    q, k, v = joint.double().transpose(1, 2).split([heads, groups, groups], dim=1)
    read = softmax_attention(rope(q, positions), rope(k, positions), v, causal=causal)
    return read.transpose(1, 2).flatten(2)


def free_energy_from_weights(
    weights: Float[Tensor, "... S"],
    v: Float[Tensor, "... S"],
    beta: Float[Tensor, "..."],
    *,
    cap: float = math.inf,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """``(mean, free)`` of values along the last dimension under any prior."""
    weights, v, beta = weights.double(), v.double(), beta.double()
    tilt = (beta.unsqueeze(-1) * v).clamp(-cap, cap)
    log_weights = torch.where(weights > 0, weights, 1).log().masked_fill(weights == 0, -torch.inf)
    return (weights * v).sum(-1), (log_weights + tilt).logsumexp(-1) / beta


def free_energy_read(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    beta: Float[Tensor, "G V"],
    *,
    cap: float = 40.0,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"]]:
    """Mean and free energy under the causal softmax prior (Lu & Yang 2026)."""
    share = q.shape[1] // k.shape[1]
    weights = softmax_weights(q, k).unsqueeze(3)
    values = v.double().repeat_interleave(share, dim=1).permute(0, 1, 3, 2).unsqueeze(2)
    temperature = (
        beta.double().repeat_interleave(share, dim=0)[:, None, :].expand(*values.shape[:2], q.shape[2], -1)
    )
    return free_energy_from_weights(
        weights.expand(*temperature.shape, -1), values.expand(*temperature.shape, -1), temperature, cap=cap
    )


def masked_free_energy(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    beta: Float[Tensor, "G V"],
    *,
    mask: Shaped[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float = 40.0,
) -> Float[Tensor, "B H T V"]:
    """The free energy of one query, head and row at a time; 0 where no key is seen."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    batch, heads, times, sources = *q.shape[:3], k.shape[2]
    share, scale = heads // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        mask = torch.ones(times, sources, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias = mask.double().expand(batch, heads, times, sources)
    rows = []
    for b in range(batch):
        for h in range(heads):
            keys, values, temperature = k[b, h // share], v[b, h // share], beta[h // share]
            for t in range(times):
                scores = scale * keys @ q[b, h, t] + bias[b, h, t]
                seen = scores > -torch.inf
                weights = scores[seen].softmax(0).expand(values.shape[-1], -1)
                free = free_energy_from_weights(weights, values[seen].T, temperature, cap=cap)[1]
                rows.append(free if seen.any() else 0 * temperature)
    return torch.stack(rows).view(batch, heads, times, -1)


def free_energy_posterior(
    weights: Float[Tensor, "... S"], v: Float[Tensor, "... S"], beta: Float[Tensor, "..."]
) -> Float[Tensor, "... S"]:
    """p(i) e^{beta v_i} / sum_r p(r) e^{beta v_r}."""
    tilted = weights.double() * (beta.double().unsqueeze(-1) * v.double()).exp()
    return tilted / tilted.sum(-1, keepdim=True)


def gated_read(
    mixed: Float[Tensor, "B T H N V"],
    beta: Float[Tensor, "H V"] | None,
    inner: Float[Tensor, "B T H V"] | None = None,
    outer: Float[Tensor, "B T H V"] | None = None,
    own: Float[Tensor, "B T H V"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "B T H V"]:
    """((1 - lambda) mean + lambda log(average) / beta) u / rms(u), 0 where the average of the exponential is 0."""
    mean = read = mixed[..., 0, :].double()
    if beta is not None:
        average = mixed[..., 1, :].double()
        seen = average > 0
        read = torch.where(seen, torch.where(seen, average, 1).log() / beta.double(), 0)
        if inner is not None:
            gate = 1 / (1 + (-inner.double()).exp())
            read = (1 - gate) * mean + gate * read
    for raw, floor in ((outer, 0), (own, torch.finfo(torch.promote_types(mixed.dtype, torch.float32)).eps)):
        if raw is not None:
            u = (1 + raw.double().exp()).log() + eps
            read = read * u / (u.square().mean(-1, keepdim=True) + floor).sqrt()
    return read


def modulated_split(
    joint: Float[Tensor, "B T W"], scale: Float[Tensor, "B T W"], widths: Sequence[int]
) -> list[Float[Tensor, "B T _"]]:
    """joint (1 + scale), in parts of these widths."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    scaled = joint.double() * (1 + scale.double())
    return [scaled[..., end - width : end] for end, width in zip(ends, widths, strict=True)]
