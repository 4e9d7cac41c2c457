"""The Free Transformer of one sequence in float64, as its equations stand; codes are dense one-hot rows."""

import torch
from torch import Tensor

from helmholtz import reference
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig

Weights = dict[str, Tensor]


def doubled(model: FreeTransformer) -> Weights:
    """Leaves in float64 by name; a tied output matrix is the embedding."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    return weights | {"unembed.weight": weights.get("unembed.weight", weights["embed.weight"])}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + K/2) as complex numbers, turned by position * theta^(-2i/K)."""
    time, width = x.shape
    speed = theta ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    angles = torch.arange(time, dtype=torch.float64).outer(speed)
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attention(
    x: Tensor, source: Tensor, w: Weights, name: str, c: FreeTransformerConfig, causal: bool
) -> Tensor:
    width = c.d_model // c.n_heads
    sizes = [width * n for n in (c.n_heads, c.n_kv_heads or c.n_heads, c.n_kv_heads or c.n_heads)]
    q_weight, k_weight, v_weight = w[f"{name}.in_proj.weight"].split(sizes)
    q, k, v = x @ q_weight.T, source @ k_weight.T, source @ v_weight.T
    future = torch.ones(len(x), len(x)).triu(1).bool() & causal
    reads = []
    for head in range(c.n_heads):
        group = head // (c.n_heads // (c.n_kv_heads or c.n_heads))
        mine, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        scores = turned(q[:, mine], c.rope_theta) @ turned(k[:, shared], c.rope_theta).T / width**0.5
        reads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, shared])
    return torch.cat(reads, dim=-1) @ w[f"{name}.o_proj.weight"].T


def block(
    x: Tensor, source: Tensor, w: Weights, name: str, c: FreeTransformerConfig, causal: bool = True
) -> Tensor:
    scale = w[f"{name}.mixer_norm.weight"]
    seen = rms_norm(source, scale, c.norm_eps)
    x = x + attention(rms_norm(x, scale, c.norm_eps), seen, w, f"{name}.mixer", c, causal)
    y = rms_norm(x, w[f"{name}.mlp_norm.weight"], c.norm_eps)
    gate, up = (y @ w[f"{name}.mlp.gate_up_proj.weight"].T).chunk(2, dim=-1)
    return x + (gate * gate.sigmoid() * up) @ w[f"{name}.mlp.down_proj.weight"].T


def free_transformer(
    tokens: Tensor, code: Tensor, w: Weights, c: FreeTransformerConfig
) -> tuple[Tensor, Tensor]:
    """``(logits T vocab, bit logits T H)`` of one sequence under the codes ``T``.

    The bits' gradient is that of ``Y + (G - detach(G))`` over all codes (Fleuret 2025, eq. 8).
    """
    assert c.split_layer is not None
    x = w["embed.weight"][tokens]
    for layer in range(c.split_layer):
        x = block(x, x, w, f"blocks.{layer}", c)
    query = w["encoder.query"].expand_as(x)
    read = block(query, x, w, "encoder.block", c, causal=False)
    bits = rms_norm(read, w["encoder.norm.weight"], c.norm_eps) @ w["encoder.readout.weight"].T
    g = reference.code_probabilities(bits)
    hot = torch.nn.functional.one_hot(code, g.shape[-1]).double()
    if c.post_sampler == "table":
        r = (hot + (g - g.detach())) @ w["post_sampler.weight"]
    else:
        p = bits.sigmoid()
        chosen = reference.code_to_bits(code, c.n_latent_bits).double() + (p - p.detach())
        r = (2 * chosen - 1) @ w["post_sampler.proj.weight"].T
    for layer in range(c.split_layer, c.n_layers):
        source = x + r if layer == c.split_layer else x
        x = block(x, source, w, f"blocks.{layer}", c)
    return rms_norm(x, w["norm.weight"], c.norm_eps) @ w["unembed.weight"].T, bits
