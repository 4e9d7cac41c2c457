"""The MAD models: published sizes and initialisation, and their heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from helmholtz.experiments.mad.blocks import autoencoder, language_model, sinusoids
from helmholtz.layers.mixer_config import AttentionConfig
from helmholtz.models.base import LayerConfig
from helmholtz.models.decoder_config import DecoderConfig

VOCAB, D_MODEL, T = 11, 16, 6


def config(vocab_size=VOCAB, d_model=D_MODEL, n_heads=2, n_layers=2, d_ff=24, initializer_range=None):
    layer = LayerConfig(mixer=AttentionConfig(d_model=d_model, n_heads=n_heads), d_ff=d_ff)
    return DecoderConfig(
        vocab_size=vocab_size, d_model=d_model, layers=(layer,) * n_layers, max_seq_len=T,
        tie_embeddings=False, norm_eps=1e-5, initializer_range=initializer_range,
    )  # fmt: skip


def tokens(batch=3):
    return torch.randint(VOCAB, (batch, T))


def test_the_language_model_is_pre_norm_residuals_and_a_head():
    model, x = language_model(config()), tokens()
    stream = model.embed(x)
    for block in model.blocks:
        for norm, layer in ((block.mixer_norm, block.mixer), (block.mlp_norm, block.mlp)):
            assert norm.eps == 1e-5
            stream = stream + layer(norm(stream))
    torch.testing.assert_close(model(x).logits, model.unembed(model.norm(stream)))


def test_the_autoencoder_reads_every_token_from_the_last_state_and_its_position():
    model = autoencoder(config()).double()
    head = model.unembed
    x = tokens(2)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    moved = (model(changed).logits - model(x).logits).abs().amax((0, 2))
    assert moved.min() > 1e-9, "the first token reaches every place"
    stream = model.embed(x)
    for block in model.blocks:
        stream = block(stream)
    y = stream[:, -1:] + sinusoids(T, D_MODEL).double()
    for norm, linear in zip(head.norms[:2], head.linears[:2], strict=True):
        y = F.gelu(linear(norm(y)))
    torch.testing.assert_close(model(x).logits, head.linears[2](head.norms[2](y)))
    with pytest.raises(ValueError, match=r"tokens must be of 6 tokens each, got \(2, 5\)"):
        model(x[:, :5])


def test_positions_are_sines_and_cosines():
    table = sinusoids(9, 128)
    for t, j in ((0, 0), (3, 1), (8, 63)):
        angle = t * 10000 ** (-j / 63)
        assert table[t, j] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[t, 64 + j] == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="d_model must be even and at least 4, got 5"):
        sinusoids(3, 5)


@torch.no_grad()
def test_all_weights_start_by_their_fan_in():
    sizes = config(300, 128, n_heads=16, n_layers=1, d_ff=352)
    for model in (language_model(sizes), autoencoder(sizes)):
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linears) == (7 if model.unembed not in linears else 5)
        for linear in linears:
            assert linear.weight.std() == pytest.approx((3 * linear.in_features) ** -0.5, rel=0.03)
            assert linear.weight.abs().max() > 3 * linear.weight.std(), "normal, not uniform"
            assert linear.bias is None or (linear.bias == 0).all()
        assert model.embed.weight.std() == pytest.approx((3 * 128) ** -0.5, rel=0.03)


@torch.no_grad()
def test_weights_start_as_published():
    sizes = config(300, 128, n_heads=16, n_layers=1, d_ff=352, initializer_range=0.02)
    lm = language_model(sizes)
    for linear in (lm.unembed, lm.blocks[0].mixer.in_proj, lm.blocks[0].mlp.down_proj):
        bound = linear.in_features**-0.5  # uniform, as torch draws
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    auto = autoencoder(sizes)
    for linear in (*auto.unembed.linears, auto.blocks[0].mixer.in_proj, auto.blocks[0].mlp.down_proj):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.03) and linear.weight.abs().max() > 0.06
    for model, heads in ((lm, [lm.unembed]), (auto, auto.unembed.linears)):
        assert model.embed.weight.std() == pytest.approx(0.02, rel=0.03)
        assert all((linear.bias == 0).all() for linear in heads)
