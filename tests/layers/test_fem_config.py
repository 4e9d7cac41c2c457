"""Widths and options of a mixer: what is filled in, and which combinations are refused and why."""

import dataclasses

import pytest

from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig, Widths, fem_widths

README = [
    # d_model, n_heads, fem_ratio, p_t_to_fem_ratio -> |Q| = |K| per head, V per head
    (512, 8, 0.5, 4.0, Widths(64, 32)),
    (512, 8, 2 / 3, 2.0, Widths(44, 43)),
    (512, 8, 1.0, 2.0, Widths(64, 64)),
]


@pytest.mark.parametrize(("d_model", "n_heads", "ratio", "qk_ratio", "expected"), README)
def test_the_sizings_of_the_original_readme(d_model, n_heads, ratio, qk_ratio, expected):
    widths = fem_widths(d_model, n_heads, fem_ratio=ratio, qk_ratio=qk_ratio)
    assert widths == expected
    d, d_qk = n_heads * widths.d_head_v, n_heads * widths.d_head
    assert abs(d - ratio * d_model) <= n_heads / 2
    assert abs(2 * d_qk - qk_ratio * d) <= 2 * n_heads


@pytest.mark.parametrize(("d_model", "n_heads"), [(128, 4), (512, 8), (1024, 16), (4096, 32)])
def test_the_first_sizing_makes_keys_as_wide_as_two_signals(d_model, n_heads):
    widths = fem_widths(d_model, n_heads)
    assert widths.d_head == 2 * widths.d_head_v
    assert n_heads * widths.d_head == d_model
    assert 4 * n_heads * widths.d_head_v + 2 * n_heads * widths.d_head == 4 * d_model


def test_half_way_rounds_up_and_heads_never_vanish():
    assert fem_widths(40, 8, fem_ratio=0.5, qk_ratio=2.0) == Widths(4, 3)
    assert fem_widths(4, 8) == Widths(2, 1)
    for d_model in range(8, 400, 7):
        for n_heads in (1, 3, 8):
            widths = fem_widths(d_model, n_heads, fem_ratio=2 / 3, qk_ratio=2.0)
            assert widths.d_head % 2 == 0 and widths.d_head_v >= 1


@pytest.mark.parametrize("ratios", [{"fem_ratio": 0.0}, {"qk_ratio": -1.0}, {"fem_ratio": float("nan")}])
def test_ratios_are_positive(ratios):
    with pytest.raises(ValueError, match="ratio"):
        fem_widths(64, 4, **ratios)


@pytest.mark.parametrize("prior", PRIORS)
def test_a_config_is_complete_once_made_and_survives_a_round_trip(prior):
    config = FreeEnergyMixerConfig(d_model=64, n_heads=4, prior=prior)
    assert FreeEnergyMixerConfig(**dataclasses.asdict(config)) == config
    expected = {"softmax": 16, "linear": 16, "gla": 16, "rnn_softmax": 8, "mamba": None}[prior]
    assert (config.n_kv_heads, config.d_head_v, config.d_head) == (4, 8, expected)
    assert config.tdc_width == 8
    assert config.rope_theta == (0.0 if prior == "mamba" else 10000.0)
    assert (config.decay, config.d_state) == (
        "head" if prior == "gla" else None,
        16 if prior == "mamba" else None,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3


def test_the_conditioning_is_a_sixteenth_of_the_value_path():
    assert FreeEnergyMixerConfig(d_model=1024, n_heads=8).tdc_width == 32
    assert FreeEnergyMixerConfig(d_model=8, n_heads=2).tdc_width == 8


WRONG = [
    ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
    ({"n_heads": -4}, "n_heads must be an integer of at least 1"),
    ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads, got n_kv_heads=3 and n_heads=4"),
    ({"n_kv_heads": 2, "prior": "gla"}, "prior must be 'softmax' for grouped key/value heads.*got 'gla'"),
    ({"d_head": 0}, "d_head must be an integer of at least 1"),
    ({"d_head": 5}, r"d_head must be even for rotary positions \(or set rope_theta=0\), got 5"),
    ({"d_head_v": 0}, "d_head_v must be an integer of at least 1"),
    ({"d_head": 6, "prior": "rnn_softmax"}, "d_head must be d_head_v = 8 for rnn_softmax.*got 6"),
    ({"tdc_width": -2}, "tdc_width must be an integer of at least 0"),
    ({"tdc_width": 3, "tdc_bidirectional": True, "causal": False}, "tdc_width"),
    ({"tdc_bidirectional": True}, "tdc_bidirectional: got True, but causal=True"),
    ({"tdc_width": 0, "tdc_bidirectional": True, "causal": False}, "tdc_bidirectional: .* no conditioning"),
    ({"tdc_width": 0, "tdc_norm_first": False}, "tdc_norm_first: .* no conditioning"),
    ({"rope_theta": -1.0}, "rope_theta must be a finite number of at least 0"),
    ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, "dropout must be in"),
    ({"cap": 0.0}, r"cap must be in \(0, 80\] nats"),
    ({"cap": 100.0}, r"cap must be in \(0, 80\] nats"),
    ({"eps": 0.0}, "eps must be a finite number above 0"),
    ({"decay": "head"}, "decay: got 'head', but only prior='gla' decays"),
    ({"d_state": 8}, "d_state: got 8, but only prior='mamba' has states"),
    ({"d_state": 0, "prior": "mamba"}, "d_state must be an integer of at least 1"),
    ({"d_head": 8, "prior": "mamba"}, "d_head: got 8, but mamba has no queries and keys"),
    ({"rope_theta": 100.0, "prior": "mamba"}, "rope_theta: got 100.0, but mamba has no queries"),
    ({"cap": 20.0, "read": "mean"}, "cap: got 20.0, but the mean"),
    ({"theta_init": 1.0, "read": "free_energy"}, "theta_init: got 1.0, but only read='temperature'"),
    ({"normalize": False}, "normalize: got False, but an unnormalised scan is no distribution"),
    ({"normalize": False, "prior": "mamba"}, "normalize: got False.*read='mean'"),
    ({"normalize": False, "prior": "mamba", "read": "free_energy"}, "normalize: got False.*read='mean'"),
    ({"backend": "fla"}, "backend must be one of .*flash_attn.*got 'fla'"),
    ({"backend": "flash_attn", "prior": "gla"}, "backend must be one of .*fla.*got 'flash_attn'"),
    ({"backend": "fla", "prior": "mamba"}, "backend must be one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_wrong_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        FreeEnergyMixer(FreeEnergyMixerConfig(**{"d_model": 64, "n_heads": 4, **options}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("d_model", 64.0, "d_model must be an integer"),
        ("prior", "sofmax", "prior must be one of .*got 'sofmax'; did you mean 'softmax'"),
        ("read", "lse", "read must be one of .*got 'lse'"),
        ("decay", "key", "decay must be one of .*got 'key'"),
        ("backend", "cuda", "backend must be one of .*got 'cuda'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value, message):
    """What the annotations forbid reaches users, who run without shape checks, as a message too."""
    config = FreeEnergyMixerConfig(d_model=64, n_heads=4, prior="gla")
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


@pytest.mark.parametrize("d_model", [128, 136, 200, 328])
@pytest.mark.parametrize("prior", PRIORS)
def test_defaults_fit_together_at_any_width(d_model, prior):
    config = FreeEnergyMixerConfig(d_model=d_model, n_heads=8, prior=prior)
    assert abs(config.d_head_v - d_model / 16) < 2 and config.d_head_v * 16 >= d_model - 8
