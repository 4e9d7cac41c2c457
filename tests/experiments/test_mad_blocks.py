"""The MAD backbones: published sizes and initialisation, logits at chosen places, no look into the future."""

import math

import pytest
import torch
import torch.nn.functional as F

from helmholtz.experiments.mad.blocks import MadAutoencoder, MadLanguageModel, sinusoids
from helmholtz.layers.attention import Attention

VOCAB, D_MODEL, T = 11, 16, 6


def mixers():
    return [Attention(D_MODEL, 2), Attention(D_MODEL, 2)]


def language_model():
    return MadLanguageModel(VOCAB, mixers(), d_model=D_MODEL, d_ff=24)


def autoencoder():
    return MadAutoencoder(VOCAB, mixers(), seq_len=T, d_model=D_MODEL, d_ff=24)


def tokens(batch=3):
    return torch.randint(VOCAB, (batch, T))


@pytest.mark.parametrize("make", [language_model, autoencoder])
def test_logits_and_gradients_at_places_are_those_of_the_whole(make):
    model, x = make().double(), tokens()
    places, targets = torch.rand(3, T) < 0.4, torch.randint(VOCAB, (3, T))
    whole = model(x)
    assert whole.shape == (3, T, VOCAB)
    torch.testing.assert_close(model.logits_at(x, places), whole[places], rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(F.cross_entropy(logits, wanted, ignore_index=-100), list(model.parameters()))
        for logits, wanted in (
            (whole.flatten(0, 1), targets.masked_fill(~places, -100).flatten()),
            (model.logits_at(x, places), targets[places]),
        )
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_the_language_model_is_pre_norm_residuals_and_a_head():
    model, x = language_model(), tokens()
    stream = model.embed(x)
    for block in model.blocks:
        for norm, layer in ((block.mixer_norm, block.mixer), (block.mlp_norm, block.mlp)):
            assert norm.eps == 1e-5
            stream = stream + layer(norm(stream))
    torch.testing.assert_close(model(x), model.head(model.norm(stream)))


def test_the_autoencoder_reads_every_token_from_the_last_state_and_its_position():
    model = autoencoder().double()
    x = tokens(2)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    assert (model(changed) - model(x)).abs().amax((0, 2)).min() > 1e-9, "the first token reaches every place"
    stream = model.embed(x)
    for block in model.blocks:
        stream = block(stream)
    y = stream[:, -1:] + sinusoids(T, D_MODEL).double()
    for norm, linear in zip(model.norms[:2], model.linears[:2], strict=True):
        y = F.gelu(linear(norm(y)))
    torch.testing.assert_close(model(x), model.linears[2](model.norms[2](y)))
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
def test_weights_start_as_published():
    lm = MadLanguageModel(300, [Attention(128, 16)], d_model=128, d_ff=352)
    for linear in (lm.head, lm.blocks[0].mixer.in_proj, lm.blocks[0].mlp.down_proj):
        bound = linear.in_features**-0.5  # uniform, as torch draws
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    auto = MadAutoencoder(300, [Attention(128, 16)], seq_len=T, d_model=128, d_ff=352)
    for linear in (*auto.linears, auto.blocks[0].mixer.in_proj, auto.blocks[0].mlp.down_proj):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.03) and linear.weight.abs().max() > 0.06
    for model, heads in ((lm, [lm.head]), (auto, auto.linears)):
        assert model.embed.weight.std() == pytest.approx(0.02, rel=0.03)
        assert all((linear.bias == 0).all() for linear in heads)


def test_bad_sizes():
    with pytest.raises(ValueError, match="mixers must be at least one"):
        MadLanguageModel(VOCAB, [], d_model=D_MODEL, d_ff=24)
    with pytest.raises(ValueError, match="d_ff must be an integer of at least 1, got 0"):
        MadLanguageModel(VOCAB, mixers(), d_model=D_MODEL, d_ff=0)
