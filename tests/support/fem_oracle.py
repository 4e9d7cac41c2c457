"""The Free Energy Mixer in float64, one sequence and one pair of tokens at a time, from the paper's equations.

A pad is absence: rows are cut to their real tokens, packed rows to their sequences, before anything is computed.
Nothing but parameters is taken from the layer under test.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz.layers.fem import FreeEnergyMixer


def mixer_output(
    mixer: FreeEnergyMixer,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """What the layer must return for ``B T D``."""
    rows = []
    for b in range(x.shape[0]):
        row = torch.zeros_like(x[b], dtype=torch.float64)
        for index in _sequences(x.shape[1], None if mask is None else mask[b], cu_seqlens):
            source = None
            if context is not None:
                source = context[b] if context_mask is None else context[b][context_mask[b].bool()]
            row = row.index_copy(0, index, one_sequence(mixer, x[b][index], source))
        rows.append(row)
    return torch.stack(rows)


def prior_weights(mixer: FreeEnergyMixer, x: Tensor) -> Tensor:
    """``H T S V``: the weights of one sequence ``T D``."""
    features = _features(mixer, x, x)
    return _weights(mixer, features, x.shape[0])


def one_sequence(mixer: FreeEnergyMixer, x: Tensor, source: Tensor | None = None) -> Tensor:
    c = mixer.config
    source = x if source is None else source
    features = _features(mixer, x, source)
    if source.shape[0] == 0:
        return x.new_zeros(x.shape, dtype=torch.float64) + _bias(mixer.o_proj, x)
    weights = _weights(mixer, features, source.shape[0])
    v = _heads(features["v"], c.n_kv_heads).repeat_interleave(c.n_heads // c.n_kv_heads, dim=0)
    mean = torch.einsum("htsv,hsv->htv", weights, v)
    read = _gated(mixer, features, weights, v, mean)
    if c.outer_gate:
        outer = _heads(features["outer"], c.n_heads)
        gate = (
            torch.logaddexp(outer, torch.zeros_like(outer)) + c.eps
        )  # torch's softplus is x from 20 on, e^-20 off
        read = read * gate / gate.square().mean(-1, keepdim=True).sqrt()
    if c.prior == "rnn_softmax":
        gate = F.softplus(_turned(c, features["q"], c.n_heads)) + c.eps
        read = read * gate / gate.square().mean(-1, keepdim=True).sqrt()
    out = read.transpose(0, 1).flatten(1) @ mixer.o_proj.weight.double().T
    return out + _bias(mixer.o_proj, x)


def _sequences(time: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    if cu_seqlens is not None:
        return [
            torch.arange(a, b)
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=False)
        ]
    return [torch.arange(time) if mask is None else mask.bool().nonzero().squeeze(1)]


def _gated(mixer: FreeEnergyMixer, features: dict, weights: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    c = mixer.config
    if c.read == "mean":
        return mean
    beta = torch.ones(c.n_kv_heads, c.d_head_v, dtype=torch.float64)
    if c.read == "temperature":
        beta = F.softplus(mixer.theta.double()) + c.eps
    beta = beta.repeat_interleave(c.n_heads // c.n_kv_heads, dim=0).unsqueeze(1)
    tilt = (beta * v).clamp(-c.cap, c.cap).unsqueeze(1)
    log_weights = torch.where(weights > 0, weights, 1.0).log().masked_fill(weights == 0, -torch.inf)
    free = (log_weights + tilt).logsumexp(2) / beta
    if c.read == "free_energy":
        return free
    inner = _heads(features["inner"], c.n_heads).sigmoid()
    return (1 - inner) * mean + inner * free


def _features(mixer: FreeEnergyMixer, x: Tensor, source: Tensor) -> dict[str, Tensor]:
    """``(W x + b) (1 + S f)`` by name: queries' features from ``x``, keys' from ``source``."""
    features, start = {}, 0
    for widths, side in [(mixer.query_widths, x.double()), (mixer.key_widths, source.double())]:
        conditioning = None if mixer.tdc is None else tdc_features(mixer, side)
        for name, width in widths.items():
            rows = slice(start, start + width)
            value = side @ mixer.in_proj.weight[rows].double().T
            if mixer.in_proj.bias is not None:
                value = value + mixer.in_proj.bias[rows].double()
            if conditioning is not None:
                value = value * (1 + conditioning @ mixer.tdc.out_proj.weight[rows].double().T)
            features[name], start = value, start + width
    return features


def tdc_features(mixer: FreeEnergyMixer, x: Tensor) -> Tensor:
    """Time-decay conditioning, one token after another."""
    tdc, c = mixer.tdc, mixer.config
    z = _layer_norm(tdc.norm, x.double()) if c.tdc_norm_first else x.double()
    rate, drive, gate = (z @ tdc.in_proj.weight.double().T + tdc.in_proj.bias.double()).chunk(3, dim=-1)
    decay = (-F.softplus(rate)).exp()
    width = c.tdc_width
    if c.tdc_bidirectional:
        half = width // 2
        ahead = _recurrence(decay[:, :half], drive[:, :half])
        h = torch.cat([ahead, _recurrence(decay[:, half:].flip(0), drive[:, half:].flip(0)).flip(0)], dim=1)
    else:
        h = _recurrence(decay, drive)
    gate = F.softplus(gate)
    gate = gate / (gate.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    return gate * _layer_norm(tdc.state_norm, h)


def _recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    h, out = torch.zeros_like(drive[:1].sum(0)), []
    for a, u in zip(decay.unbind(0), drive.unbind(0), strict=True):
        h = a * h + u
        out.append(h)
    return torch.stack(out) if out else drive


def _layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight.double() + norm.bias.double()


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _bias(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    return torch.zeros(x.shape[-1], dtype=torch.float64) if linear.bias is None else linear.bias.double()


def _turned(c, x: Tensor, heads: int) -> Tensor:
    """Heads with the pair (i, i + K/2) of token t turned by t theta^(-2i/K)."""
    x = _heads(x, heads)
    if not c.rope_theta:
        return x
    half = x.shape[-1] // 2
    frequency = torch.tensor([c.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _weights(mixer: FreeEnergyMixer, features: dict[str, Tensor], sources: int) -> Tensor:
    c = mixer.config
    mass = {
        "softmax": _softmax_mass,
        "linear": _linear_mass,
        "gla": _linear_mass,
        "rnn_softmax": _rnn_softmax_mass,
        "mamba": _mamba_mass,
    }[c.prior](mixer, features)
    if c.causal:
        future = torch.ones(sources, sources, dtype=torch.bool).triu(1)
        mass = mass.masked_fill(future.unsqueeze(-1), 0)
    if not c.normalize:
        return mass
    return mass / mass.sum(2, keepdim=True)


def _softmax_mass(mixer: FreeEnergyMixer, features: dict[str, Tensor]) -> Tensor:
    c = mixer.config
    q = _turned(c, features["q"], c.n_heads)
    k = _turned(c, features["k"], c.n_kv_heads).repeat_interleave(c.n_heads // c.n_kv_heads, dim=0)
    return (torch.einsum("htk,hsk->hts", q, k) / math.sqrt(c.d_head)).exp().unsqueeze(-1)


def _linear_mass(mixer: FreeEnergyMixer, features: dict[str, Tensor]) -> Tensor:
    c = mixer.config
    q, k = (_turned(c, features[name], c.n_heads).relu() + c.eps for name in ("q", "k"))
    if c.prior == "linear":
        return torch.einsum("htk,hsk->hts", q, k).unsqueeze(-1)
    log_decay = F.logsigmoid(features["decay"]) / 16
    between = _between(_heads(log_decay, c.n_heads).expand_as(k))
    return torch.einsum("htk,hsk,htsk->hts", q, k, between.exp()).unsqueeze(-1)


def _rnn_softmax_mass(mixer: FreeEnergyMixer, features: dict[str, Tensor]) -> Tensor:
    k = _turned(mixer.config, features["k"], mixer.config.n_heads)
    return k.exp().unsqueeze(1).expand(-1, k.shape[1], -1, -1)


def _mamba_mass(mixer: FreeEnergyMixer, features: dict[str, Tensor]) -> Tensor:
    c = mixer.config
    delta = (-F.softplus(features["delta"])).exp()
    b, gain = (F.softplus(features[name]) + c.eps for name in ("b", "c"))
    rate = -F.softplus(mixer.prior.A_raw.double())
    log_decay = delta.unsqueeze(-1) * rate
    decay = _between(log_decay.permute(2, 0, 1)).exp().permute(1, 2, 3, 0)
    mass = torch.einsum("tn,sn,sc,tscn->tsc", gain, b, delta, decay)
    skip = F.softplus(mixer.prior.D_raw.double())
    mass = mass + torch.eye(mass.shape[0], dtype=torch.float64).unsqueeze(-1) * skip
    return mass.unflatten(-1, (c.n_heads, -1)).permute(2, 0, 1, 3)


def _between(log_decay: Tensor) -> Tensor:
    """``G T C`` to ``G T S C``: decay from s to t, over the steps s+1..t, or t..s-1 where s lies ahead."""
    time = log_decay.shape[1]
    rows = []
    for t in range(time):
        steps = [log_decay[:, s + 1 : t + 1] if s <= t else log_decay[:, t:s] for s in range(time)]
        rows.append(torch.stack([step.sum(1) for step in steps], dim=1))
    return torch.stack(rows, dim=1)
