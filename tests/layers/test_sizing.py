"""Blocks of every prior hold the parameters of the baseline block, within 2 %."""

import pytest
import torch

from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig, fem_widths
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sizing import (
    attention_block_parameters,
    matched_d_ff,
    matched_size,
)
from helmholtz.layers.sizing import count_parameters as count

SIZES = [
    (128, 4),
    (128, 16),
    (144, 9),
    (192, 3),
    (256, 4),
    (384, 6),
    (512, 8),
    (768, 12),
    (1000, 10),
    (1024, 16),
    (2048, 16),
]
SIZINGS = {"half": (0.5, 4.0), "two thirds": (2 / 3, 2.0)}


def fem_parameters(**fields):
    with torch.device("meta"):
        return count(FreeEnergyMixer(FreeEnergyMixerConfig(**fields)))


def sized(d_model, n_heads, prior, ratio, qk_ratio, **options):
    widths = fem_widths(d_model, n_heads, fem_ratio=ratio, qk_ratio=qk_ratio)
    if prior == "rnn_softmax":
        even = 2 * ((widths.d_head_v + 1) // 2)
        options |= {"d_head": even, "d_head_v": even}
    else:
        options |= {"d_head_v": widths.d_head_v} | ({} if prior == "mamba" else {"d_head": widths.d_head})
    return FreeEnergyMixerConfig(d_model=d_model, n_heads=n_heads, prior=prior, **options)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("sizing", SIZINGS)
def test_a_block_holds_the_parameters_of_the_baseline_block(prior, sizing):
    for d_model, n_heads in SIZES:
        d_ff = 8 * d_model // 3
        mixer = sized(d_model, n_heads, prior, *SIZINGS[sizing])
        with torch.device("meta"):
            fem = count(FreeEnergyMixer(mixer)) + count(SwiGLU(d_model, matched_d_ff(mixer, d_ff=d_ff)))
            baseline = count(Attention(d_model, n_heads)) + count(SwiGLU(d_model, d_ff))
        assert abs(fem / baseline - 1) < 0.02, (d_model, n_heads, fem / baseline)
        assert abs(fem / baseline - 1) < 0.005, "the rounding alone should cost no more than this"


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"tdc_width": 64}, {"n_kv_heads": 2}, {"outer_gate": False}, {"read": "mean"}]
)
def test_options_are_absorbed_too(options):
    mixer = FreeEnergyMixerConfig(d_model=256, n_heads=8, **options)
    with torch.device("meta"):
        fem = count(FreeEnergyMixer(mixer)) + count(SwiGLU(256, matched_d_ff(mixer, d_ff=704)))
        baseline = count(Attention(256, 8, n_kv_heads=mixer.n_kv_heads)) + count(SwiGLU(256, 704))
    assert abs(fem / baseline - 1) < 0.02


def test_the_nearest_size_is_found_whatever_grows_with_it():
    def build(n):
        return torch.nn.Linear(7, n)  # 8 n parameters

    assert [matched_size(build, target) for target in (79, 80, 83, 85)] == [10, 10, 10, 11]
    assert matched_size(build, 100, multiple_of=5) == 10 and matched_size(build, 101, multiple_of=5) == 15


def test_layers_share_one_width_and_the_baseline_has_the_fewest_heads_of_keys():
    mixers = [FreeEnergyMixerConfig(d_model=64, n_heads=4, n_kv_heads=2)]
    mixers += [FreeEnergyMixerConfig(d_model=64, n_heads=4, prior=prior) for prior in ("gla", "mamba")]
    width = matched_d_ff(*mixers, d_ff=176)
    ours = sum(count(FreeEnergyMixer(m)) + count(SwiGLU(64, width)) for m in mixers)
    wanted = 3 * attention_block_parameters(64, 4, 2, 176)
    assert wanted == 3 * (2 * 64**2 + 64**2 + 3 * 64 * 176)
    assert abs(ours - wanted) <= 3 * 3 * 64 * 4 / 2


@pytest.mark.parametrize(
    ("prior", "multiple"), [("softmax", 4.0), ("linear", 4.0), ("gla", 4.0), ("mamba", 2.5)]
)
def test_the_projections_cost_what_the_paper_says(prior, multiple):
    """In units of D^2, the conditioning (d / 16 wide) left out."""
    found = fem_parameters(d_model=1024, n_heads=8, prior=prior, tdc_width=0)
    assert abs(found / 1024**2 - multiple) < 0.06


def test_the_conditioning_costs_about_five_percent():
    with_it, without = (fem_parameters(d_model=1024, n_heads=8, tdc_width=w) for w in (None, 0))
    assert 1.04 < with_it / without < 1.06


def test_the_width_is_a_multiple_and_a_mixer_too_large_is_refused():
    mixer = FreeEnergyMixerConfig(d_model=256, n_heads=8)
    assert matched_d_ff(mixer, d_ff=700, multiple_of=16) % 16 == 0
    wide = FreeEnergyMixerConfig(d_model=256, n_heads=8, d_head_v=512)
    with pytest.raises(
        ValueError, match="d_ff: .* cannot be matched, without it there are .*: narrow the mixers"
    ):
        matched_d_ff(wide, d_ff=256)
