"""The drop-in for ``nn.MultiheadAttention``: equal at the start, exact after it, and honest about the rest."""

import pytest
import torch
from torch import nn

from helmholtz.layers import FreeEnergyAttention
from helmholtz.reference import masked_free_energy

WIDTH, HEADS = 12, 3
VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 10, "vdim": 7},
    "double": {"dtype": torch.float64},
}
EVERY_MASK = ("none", "causal", "added", "per head", "padding", "both", "added padding")


def pair(**options):
    """``nn.MultiheadAttention`` with biases that are not zero, and its drop-in."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for name, parameter in attention.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return attention, FreeEnergyAttention.from_multihead_attention(attention)


def inputs(attention, *, times=5, sources=5, batch=2):
    widths = (attention.embed_dim, attention.kdim, attention.vdim)
    found = [torch.randn(batch, n, w) for n, w in zip((times, sources, sources), widths, strict=True)]
    found = [x.to(attention.out_proj.weight.dtype) for x in found]
    return found if attention.batch_first else [x.transpose(0, 1) for x in found]


def masks(kind, dtype=torch.float32):
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "added": {"attn_mask": torch.randn(5, 5).to(dtype)},
        "per head": {"attn_mask": (torch.rand(2 * HEADS, 5, 5) > 0.7) & ~torch.eye(5, dtype=torch.bool)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "added padding": {
            "key_padding_mask": padding.to(dtype) * -2,
            "attn_mask": torch.randn(5, 5).to(dtype),
        },
    }[kind]


def livened(layer):
    for name, parameter in layer.free_energy.named_parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (name == "alpha"))
    return layer


@pytest.mark.parametrize("kind", EVERY_MASK)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("need_weights", [False, True], ids=["no weights", "weights"])
def test_it_starts_as_multihead_attention(variant, kind, need_weights):
    attention, layer = pair(**VARIANTS[variant])
    given = inputs(attention)
    call = masks(kind, given[0].dtype) | {"need_weights": need_weights}
    for average in (True, False):
        expected, weights = attention(*given, **call, average_attn_weights=average)
        actual, own = layer(*given, **call, average_attn_weights=average)
        torch.testing.assert_close(actual, expected)
        assert (own is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(own, weights)


@pytest.mark.parametrize("kind", ["none", "causal"])
def test_without_weights_the_start_is_equal_also_in_training(kind):
    """But for rounding: one projects ``T B``, the other ``B T`` rows; the same dropout, from the same seed."""
    attention, layer = pair(dropout=0.4, batch_first=True)
    given, outputs = inputs(attention), []
    for module in (attention, layer):
        torch.manual_seed(3)
        outputs.append(module(*given, **masks(kind), need_weights=False)[0])
    torch.testing.assert_close(*outputs)


def test_queries_and_keys_may_differ_in_number():
    attention, layer = pair()
    given = inputs(attention, times=3, sources=8)
    torch.testing.assert_close(layer(*given)[0], attention(*given)[0])


def test_the_promise_of_causality_changes_nothing():
    attention, layer = pair(batch_first=True)
    given, call = inputs(attention), masks("causal") | {"need_weights": False}
    livened(layer)
    torch.testing.assert_close(layer(*given, **call, is_causal=True)[0], layer(*given, **call)[0])
    padded = masks("both") | {"need_weights": False}
    assert torch.equal(layer(*given, **padded, is_causal=True)[0], layer(*given, **padded)[0])


def by_hand(layer, query, key, value, seen):
    """Float64, from the formula; ``seen`` is ``T S``."""
    p = {name: x.double() for name, x in layer.named_parameters()}
    q, k, v = (
        (x.double() @ w.T + b).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        for x, w, b in zip(
            (query, key, value), p["in_proj_weight"].chunk(3), p["in_proj_bias"].chunk(3), strict=True
        )
    )
    scores = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).masked_fill(~seen, -torch.inf)
    mean = (scores.softmax(-1) @ v).transpose(1, 2)
    free = masked_free_energy(q, k, v, p["free_energy.log_beta"].exp(), mask=seen).transpose(1, 2)
    inner, outer = (query.double() @ p[f"free_energy.{name}.weight"].T for name in ("inner", "outer"))
    lam = p["free_energy.alpha"] * inner.view(mean.shape).sigmoid()
    read = outer.view(mean.shape).exp() * (mean + lam * (free - mean))
    return read.flatten(2) @ p["out_proj.weight"].T + p["out_proj.bias"]


@pytest.mark.parametrize("need_weights", [False, True])
def test_after_the_start_output_and_gradients_are_those_of_the_formula(need_weights):
    layer = livened(pair(batch_first=True, dtype=torch.float64)[1])
    given = [x.requires_grad_() for x in inputs(layer)]
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    actual = layer(*given, attn_mask=~seen, need_weights=need_weights)[0]
    expected = by_hand(layer, *given, seen)
    torch.testing.assert_close(actual, expected)
    leaves, cotangent = [*given, *layer.parameters()], torch.randn_like(actual)
    both = (torch.autograd.grad((out * cotangent).sum(), leaves) for out in (actual, expected))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want)


def test_the_future_and_the_pads_change_no_bit():
    layer = livened(pair(batch_first=True)[1])
    x = torch.randn(2, 5, WIDTH)
    spoilt = x.clone()
    spoilt[:, 3:] += 100
    mask = masks("causal")
    early = [layer(y, y, y, **mask, need_weights=False)[0][:, :3] for y in (x, spoilt)]
    assert torch.equal(*early)
    pads = {"key_padding_mask": torch.arange(5).expand(2, -1) >= 3, "need_weights": False}
    torch.testing.assert_close(layer(x, spoilt, spoilt, **pads)[0], layer(x, x, x, **pads)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_sees_nothing_reads_zero(need_weights, added):
    layer = livened(pair(batch_first=True)[1])
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    blocked[2] = True
    mask = torch.zeros(5, 5).masked_fill(blocked, -torch.inf) if added else blocked
    out, weights = layer(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(out[:, 2], layer.out_proj.bias.expand(2, -1))
    assert weights is None or (weights[:, 2] == 0).all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_in_the_mean_and_not_in_the_free_energy(need_weights):
    layer = pair(dropout=0.5, batch_first=True)[1]
    given = inputs(layer)
    outs = [layer(*given, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.equal(*outs)
    layer.free_energy.alpha.data.fill_(2.0)  # lambda = 1
    outs = [layer(*given, need_weights=need_weights)[0] for _ in range(2)]
    torch.testing.assert_close(*outs)


def test_a_state_dict_of_multihead_attention_lacks_the_new_parameters_alone():
    attention, _ = pair()
    layer = FreeEnergyAttention(WIDTH, HEADS)
    with pytest.raises(RuntimeError, match=r"Missing key.*free_energy\.alpha"):
        layer.load_state_dict(attention.state_dict())
    found = layer.load_state_dict(attention.state_dict(), strict=False)
    new = {f"free_energy.{name}" for name in layer.free_energy.state_dict()}
    assert set(found.missing_keys) == new and not found.unexpected_keys
    given = inputs(attention)
    torch.testing.assert_close(layer(*given)[0], attention(*given)[0])


def test_the_copy_shares_no_memory_and_keeps_mode_and_dropout():
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3).eval()
    layer = FreeEnergyAttention.from_multihead_attention(attention, gates="head", beta=2.0, cap=9.0)
    assert not layer.training and layer.dropout == 0.3 and layer.free_energy.cap == 9.0
    assert layer.free_energy.alpha.shape == (HEADS, 1)
    torch.testing.assert_close(layer.free_energy.beta, torch.full((HEADS, WIDTH // HEADS), 2.0))
    layer.in_proj_weight.data.zero_()
    assert (attention.in_proj_weight != 0).any()


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_an_encoder_layer_it_is_not_passed_over(norm_first):
    """Without gradients ``nn.TransformerEncoderLayer`` calls a fused kernel in its place (heads must be even)."""
    encoder = nn.TransformerEncoderLayer(
        WIDTH, 4, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    ).eval()
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        before = encoder(x)
        encoder.self_attn = FreeEnergyAttention.from_multihead_attention(encoder.self_attn)
        torch.testing.assert_close(encoder(x), before)
        livened(encoder.self_attn)
        after = encoder(x)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, encoder(x))  # with gradients


def test_a_new_layer_starts_as_multihead_attention_would():
    torch.manual_seed(4)
    layer = FreeEnergyAttention(WIDTH, HEADS)
    torch.manual_seed(4)
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    torch.testing.assert_close(layer.in_proj_weight.std(), attention.in_proj_weight.std(), rtol=0.1, atol=0)
    assert (layer.in_proj_bias == 0).all() and (layer.out_proj.bias == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim"),
        ({"add_bias_kv": True}, "add_bias_kv must be False"),
        ({"add_zero_attn": True}, "add_zero_attn must be False"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_constructions_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FreeEnergyAttention(**{"embed_dim": WIDTH, "num_heads": HEADS} | options)


def test_an_extra_key_cannot_be_copied():
    with pytest.raises(ValueError, match="add_bias_kv must be False"):
        FreeEnergyAttention.from_multihead_attention(nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True))


def test_calls_that_are_refused():
    layer, x = FreeEnergyAttention(WIDTH, HEADS), torch.randn(5, 2, WIDTH)
    with pytest.raises(
        ValueError, match=r"query: wanted three dimensions, the last of 12, got shape \(5, 12\)"
    ):
        layer(x[:, 0], x, x)
    with pytest.raises(ValueError, match=r"value: wanted .*got shape \(5, 2, 11\)"):
        layer(x, x, x[..., :-1])
    with pytest.raises(ValueError, match="is_causal: wanted the causal attn_mask beside it, got None"):
        layer(x, x, x, is_causal=True)
