import math

import pytest
import torch

from helmholtz.evals.inspection import (
    baseline_block_parameters,
    count_parameters,
    mixers,
    most_selective,
    read_text,
    summarise,
)
from helmholtz.evals.plots import plot_selection
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    priors = ("softmax", "linear", "gla", "rnn_softmax", "mamba")
    return FEMLM(FEMLMConfig(vocab_size=11, d_model=128, n_layers=5, n_heads=2, max_seq_len=16, prior=priors))


def test_parameters_are_counted_once_each(model):
    counts = {count.module: count.parameters for count in count_parameters(model)}
    assert counts["embed"] == 11 * 128
    assert counts["unembed"] == 0  # tied
    assert counts["blocks.2.mixer"] == sum(p.numel() for p in model.blocks[2].mixer.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("post_sampler", "size"), [("table", 2**5 * 64), ("bits", 5 * 64)])
def test_the_parameters_of_a_plan_are_listed(post_sampler, size):
    config = FreeTransformerConfig(
        vocab_size=11, d_model=64, n_layers=3, n_heads=2, n_latent_bits=5, post_sampler=post_sampler
    )
    model = FreeTransformer(config)
    counts = {count.module: count.parameters for count in count_parameters(model)}
    wanted = {"encoder.query": 64, "encoder.norm": 64, "encoder.readout": 5 * 64, "post_sampler": size}
    assert counts | wanted == counts
    for part in ("mixer", "mlp", "mixer_norm", "mlp_norm"):
        assert counts[f"encoder.block.{part}"] == counts[f"blocks.1.{part}"] > 0
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_the_budget_is_the_baseline_block(model):
    baseline = Transformer(TransformerConfig(vocab_size=11, d_model=128, n_layers=1, n_heads=2))
    block = baseline.blocks[0]
    wanted = sum(p.numel() for part in (block.mixer, block.mlp) for p in part.parameters())
    assert baseline_block_parameters(model) == baseline_block_parameters(baseline) == wanted


def test_a_reading_is_what_the_model_computes(model):
    readings = read_text(model, TOKENS)
    assert list(readings) == [f"blocks.{index}.mixer" for index in range(5)]
    assert not any(module._forward_pre_hooks for module in model.modules())
    for reading in readings.values():
        torch.testing.assert_close(reading.posterior.sum(-2), torch.ones_like(reading.mean))
        assert reading.prior.transpose(-1, -2).triu(1).shape[-1] == 8
        assert (reading.prior[:, :, 2, 3:] == 0).all()  # the third query sees three tokens
        torch.testing.assert_close(reading.free, reading.mean + reading.kl / reading.beta_max[:, None])


def test_a_model_that_cannot_tell_tokens_apart_reads_all_of_them(model):
    with torch.no_grad():
        for mixer in mixers(model).values():
            mixer.in_proj.weight.zero_()
    summaries = {summary.prior: summary for summary in summarise(model, read_text(model, TOKENS))}
    uniform = sum(range(2, 9)) / 7
    for prior in ("softmax", "linear"):
        assert summaries[prior].num_tokens_prior == pytest.approx(uniform, rel=1e-5)
        assert summaries[prior].num_tokens_posterior == pytest.approx(uniform, rel=1e-5)
        assert summaries[prior].kl == pytest.approx(0, abs=1e-6)
        assert summaries[prior].beta_max == pytest.approx(math.log1p(math.exp(1.8)), rel=1e-2)
        assert summaries[prior].inner_gate == pytest.approx(0.5)


def test_the_most_selective_head_is_found_and_drawn(model, tmp_path):
    readings = read_text(model, TOKENS)
    name, head = most_selective(readings)
    gap = readings[name].kl[0, head].mean()
    assert all(gap >= reading.kl[0, h].mean() for reading in readings.values() for h in range(2))
    file = tmp_path / "pictures" / "selection.png"
    plot_selection(readings[name], [f"${index} a\n" for index in range(8)], file, title="a title", head=head)
    assert file.read_bytes().startswith(b"\x89PNG")
