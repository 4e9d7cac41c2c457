"""The FEM decoder: its budget against the baseline, its options, its configuration."""

import json
from dataclasses import replace

import jsonargparse
import pytest
import torch

from helmholtz.layers.fem_config import PRIORS
from helmholtz.models import fem_lm, transformer
from helmholtz.models.decoder import Decoder
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig, MixerOptions
from helmholtz.models.transformer import Transformer, TransformerConfig


def size(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


HYBRID = ("softmax", "gla", "rnn_softmax", "mamba")
SHAPES = [(128, 4, 4), (192, 6, 2), (520, 10, 5)]


@pytest.mark.parametrize("prior", [*PRIORS, HYBRID], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_match_the_baseline(shape: tuple[int, int, int], prior: str | tuple[str, ...]) -> None:
    d_model, n_heads, n_kv_heads = shape
    if "softmax" not in (prior, *prior):
        n_kv_heads = n_heads
    sizes = {"vocab_size": 100, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    with torch.device("meta"):
        fem, baseline = FEMLM(FEMLMConfig(**sizes, prior=prior)), Transformer(TransformerConfig(**sizes))
    assert abs(size(fem) / size(baseline) - 1) < 0.01


@pytest.mark.parametrize("preset", ["small", "medium"])
def test_presets_match_each_other(preset: str) -> None:
    with torch.device("meta"):
        fem, baseline = FEMLM(getattr(fem_lm, preset)(257)), Transformer(getattr(transformer, preset)(257))
    assert abs(size(fem) / size(baseline) - 1) < 0.01
    assert size(fem) > 800_000


def test_each_layer_reads_from_its_prior() -> None:
    config = FEMLMConfig(vocab_size=50, d_model=32, n_layers=4, prior=HYBRID, n_kv_heads=2)
    mixers = [block.mixer.config for block in FEMLM(config).blocks]
    assert tuple(c.prior for c in mixers) == config.layer_priors == HYBRID
    assert [c.n_kv_heads for c in mixers] == [2, 4, 4, 4]
    assert [c.decay for c in mixers] == [None, "head", None, None]
    assert [c.d_state for c in mixers] == [None, None, None, 16]


def test_options_reach_the_mixers() -> None:
    options = MixerOptions(
        d_head=6, d_head_v=5, read="temperature", outer_gate=False, tdc_width=4, tdc_norm_first=False,
        bias=True, cap=20.0, eps=1e-5, theta_init=1.0, decay="channel", backend="torch",
    )  # fmt: skip
    config = FEMLMConfig(vocab_size=50, d_model=32, prior="gla", rope_theta=500.0, mixer=options, d_ff=40)
    mixer = FEMLM(config).blocks[1].mixer.config
    for name in ("d_head", "d_head_v", "read", "outer_gate", "tdc_width", "tdc_norm_first", "bias", "cap"):
        assert getattr(mixer, name) == getattr(options, name)
    assert (mixer.eps, mixer.theta_init, mixer.decay, mixer.backend) == (1e-5, 1.0, "channel", "torch")
    assert (mixer.rope_theta, config.d_ff) == (500.0, 40)
    unnormalised = MixerOptions(normalize=False, read="mean", d_state=3)
    mamba = FEMLM(FEMLMConfig(vocab_size=50, d_model=32, prior="mamba", mixer=unnormalised)).blocks[0].mixer
    assert (mamba.config.normalize, mamba.config.d_state, mamba.config.read) == (False, 3, "mean")


@pytest.mark.parametrize("prior", [*PRIORS, HYBRID], ids=str)
def test_a_saved_config_is_complete(prior: str | tuple[str, ...]) -> None:
    config = FEMLMConfig(vocab_size=50, d_model=64, prior=prior)
    stored = json.loads(json.dumps(config.to_dict()))
    assert FEMLMConfig.from_dict(stored) == config
    assert isinstance(stored["d_ff"], int) and isinstance(stored["mixer"]["d_head_v"], int)
    assert isinstance(stored["mixer"]["tdc_width"], int)
    used = {name: set(config.layer_priors) & set(priors) for name, priors in fem_lm._USED_BY.items()}
    for name in ("d_head", "decay", "d_state"):
        assert (stored["mixer"][name] is not None) == bool(used[name])


def test_a_list_of_priors_is_one_per_layer() -> None:
    config = FEMLMConfig(vocab_size=50, d_model=32, n_layers=2, prior=["gla", "softmax"])
    assert config.layer_priors == ("gla", "softmax") == config.prior


BAD = [
    ({"prior": "softmx"}, "prior must be one of .*'softmx'; did you mean 'softmax'"),
    ({"prior": 3}, "FEMLMConfig.prior must be a list, got 3"),
    ({"prior": ("gla", "softmax")}, "prior: 2 names for n_layers=4 layers"),
    ({"prior": "gla", "n_kv_heads": 2}, "n_kv_heads=2 acts on softmax layers; prior is 'gla'"),
    ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
    ({"n_heads": 3}, "n_heads must divide d_model"),
    ({"mixer": {"decay": "head"}}, "mixer.decay acts on gla layers; prior is 'softmax'"),
    ({"mixer": {"d_state": 8}}, "mixer.d_state acts on mamba layers"),
    ({"mixer": {"normalize": False}}, "mixer.normalize acts on mamba layers"),
    ({"prior": "mamba", "mixer": {"d_head": 8}}, "mixer.d_head acts on softmax, linear, gla layers"),
    ({"prior": "mamba", "mixer": {"normalize": False}}, "normalize: .*read='mean'"),
    ({"mixer": {"backend": "fla"}}, "mixer.backend='fla' acts on linear, gla layers"),
    ({"mixer": {"backend": "cuda"}}, "backend must be one of .*'cuda'"),
    ({"mixer": {"tdc_widht": 8}}, "FEMLMConfig.mixer has no key 'tdc_widht'; did you mean 'tdc_width'"),
    ({"mixer": 3}, "FEMLMConfig.mixer must be a mapping of names to values, got 3"),
    ({"mixer": {"d_head": 7}}, "d_head must be even"),
    ({"mixer": {"d_head_v": 64}}, "d_ff: 50,176 parameters cannot be matched, .*: narrow the mixers"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=str)
def test_bad_options_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FEMLMConfig.from_dict({"vocab_size": 50, "d_model": 32, **fields})


def test_a_config_is_parsed_from_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FEMLMConfig, "model")
    arguments = ["--model.vocab_size=50", "--model.d_model=64", "--model.mixer.tdc_width=4"]
    hybrid = [*arguments, "--model.n_layers=2", "--model.prior=[gla, softmax]", "--model.mixer.cap=3e1"]
    config = parser.instantiate(parser.parse_args(hybrid)).model
    assert config.layer_priors == ("gla", "softmax")
    assert (config.mixer.tdc_width, config.mixer.cap, config.d_model) == (4, 30.0, 64)
    single = parser.instantiate(parser.parse_args([*arguments, "--model.prior=mamba"])).model
    assert single == replace(config, prior="mamba", n_layers=4, d_ff=None, mixer=MixerOptions(tdc_width=4))
    with pytest.raises(jsonargparse.ArgumentError, match="tdc"):
        parser.parse_args(["--model.vocab_size=50", "--model.mixer.tdc=4"])
