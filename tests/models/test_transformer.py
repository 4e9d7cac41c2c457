"""The baseline against a float64 Llama written from the equations, and its configuration."""

import pytest
import torch
from torch import Tensor

from helmholtz.models.base import ModelConfig
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.transformer import Transformer, TransformerConfig, medium, small


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + K/2) as complex numbers, turned by position * theta^(-2i/K)."""
    time, width = x.shape
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :])
    speed = theta ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    pairs = pairs * torch.exp(1j * torch.arange(time, dtype=torch.float64).outer(speed))
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attention(x: Tensor, w: dict[str, Tensor], name: str, c: TransformerConfig) -> Tensor:
    width, reads = c.d_model // c.n_heads, []
    q, k, v = (x @ w[f"{name}.in_proj.weight"].T).split(
        [width * n for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)], -1
    )
    for head in range(c.n_heads):
        group = head // (c.n_heads // c.n_kv_heads)
        mine, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        scores = turned(q[:, mine], c.rope_theta) @ turned(k[:, shared], c.rope_theta).T / width**0.5
        future = torch.ones_like(scores).triu(1).bool()
        reads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, shared])
    return torch.cat(reads, dim=-1) @ w[f"{name}.o_proj.weight"].T


def llama(tokens: list[int], w: dict[str, Tensor], c: TransformerConfig) -> Tensor:
    """Logits ``T vocab`` of one sequence."""
    x = w["embed.weight"][tokens]
    for layer in range(c.n_layers):
        name = f"blocks.{layer}"
        x = x + attention(rms_norm(x, w[f"{name}.mixer_norm.weight"], c.norm_eps), w, f"{name}.mixer", c)
        y = rms_norm(x, w[f"{name}.mlp_norm.weight"], c.norm_eps)
        gate, up = (y @ w[f"{name}.mlp.gate_up_proj.weight"].T).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ w[f"{name}.mlp.down_proj.weight"].T
    output = w["embed.weight"] if c.tie_embeddings else w["unembed.weight"]
    return rms_norm(x, w["norm.weight"], c.norm_eps) @ output.T


def doubled(model: Transformer) -> dict[str, Tensor]:
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


LLAMAS = pytest.mark.parametrize("model", ["transformer", "transformer-gqa-untied"], indirect=True)


@LLAMAS
def test_logits_match_the_equations(model) -> None:
    tokens = torch.randint(37, (2, 19))
    expected = torch.stack([llama(row, doubled(model), model.config) for row in tokens.tolist()])
    error = (model(tokens).logits - expected).abs().max() / expected.abs().max()
    assert error < 2e-6
    assert (model.double()(tokens).logits - expected).abs().max() < 1e-6  # angles stay float32


@LLAMAS
def test_greedy_decoding_matches_the_equations(model) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    found = generate(model, prompts, SamplingSettings(max_new_tokens=12, temperature=0))
    for prompt, new in zip(prompts, found, strict=True):
        sequence = list(prompt)
        for _ in range(12):
            sequence.append(int(llama(sequence, doubled(model), model.config)[-1].argmax()))
        assert new == sequence[len(prompt) :]


def test_initialisation_is_by_fan_in_and_scaled_by_depth() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=500, d_model=128, n_layers=8))
    block = model.blocks[3]
    for weight in (model.embed.weight, block.mixer.in_proj.weight, block.mlp.gate_up_proj.weight):
        assert weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.03)
    for writer in (block.mixer.o_proj, block.mlp.down_proj):
        assert writer.weight.std().item() == pytest.approx((3 * writer.in_features) ** -0.5 / 4, rel=0.03)


def test_tied_embeddings_share_one_tensor() -> None:
    tied = Transformer(TransformerConfig(vocab_size=50, d_model=32))
    untied = Transformer(TransformerConfig(vocab_size=50, d_model=32, tie_embeddings=False))
    assert tied.unembed.weight is tied.embed.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert count[1] - count[0] == 50 * 32


def test_dropout_acts_in_training_only() -> None:
    model = Transformer(TransformerConfig(vocab_size=50, d_model=32, dropout=0.5))
    tokens = torch.randint(50, (1, 6))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_derived_fields_are_filled() -> None:
    config = TransformerConfig(vocab_size=50, d_model=100, n_heads=2)
    assert (config.n_kv_heads, config.d_ff) == (2, 272)
    assert TransformerConfig.from_dict(config.to_dict()) == config
    assert all(value is not None for value in config.to_dict().values())


@pytest.mark.parametrize("preset", [small, medium])
def test_presets_are_valid(preset) -> None:
    config = preset(257)
    assert config.vocab_size == 257 and isinstance(config, ModelConfig)


BAD_FIELDS = [
    ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
    ({"n_layers": True}, "n_layers must be an integer of at least 1, got True"),
    ({"n_heads": 3}, "n_heads must divide d_model, got n_heads=3 and d_model=32"),
    ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads, got n_kv_heads=3 and n_heads=4"),
    ({"d_model": 36, "n_heads": 4}, "d_model / n_heads must be even.*got 9"),
    ({"d_ff": 0}, "d_ff must be an integer of at least 1, got 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0, got 0.0"),
    ({"rope_theta": float("nan")}, "rope_theta must be a finite number above 0, got nan"),
    ({"max_seq_len": -1}, "max_seq_len must be an integer of at least 1, got -1"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_bad_fields_are_refused_by_name(fields, message) -> None:
    values = {"vocab_size": 50, "d_model": 32, "n_heads": 4} | fields
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(values)


def test_unknown_and_missing_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="TransformerConfig has no key 'n_layer'; did you mean 'n_layers'"):
        TransformerConfig.from_dict({"vocab_size": 50, "n_layer": 3})
    with pytest.raises(ValueError, match="TransformerConfig: .*vocab_size"):
        TransformerConfig.from_dict({"d_model": 32})
