"""Initial weights of every model: by fan-in at every width, or one constant; files from before the choice was there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.models.fem_lm import FEMLMConfig, MixerOptions
from helmholtz.models.free_transformer import FreeTransformerConfig
from helmholtz.models.mamba import MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfieldConfig
from helmholtz.models.transformer import TransformerConfig

CHECKPOINTS = Path(__file__).parent / "checkpoints"
WIDTHS = (64, 128, 512, 2048)
BITS = 6


def sizes(d, **others):
    return {"vocab_size": 40, "d_model": d, "n_layers": 1, "max_seq_len": 16} | others


def hybrid(d):
    fem = {"kind": "fem", "n_heads": 2, "d_head": 8, "d_head_v": 8, "prior": "gla", "tdc_width": 8}
    mamba = {"kind": "mamba", "d_inner": 64, "d_state": 8, "d_head": 32}
    layers = [{"mixer": fem, "d_ff": 24}, {"mixer": mamba}]
    plan = {
        "layer": 1,
        "n_bits": BITS,
        "encoder": {"mixer": fem | {"prior": "softmax", "causal": False}, "d_ff": 24},
    }
    equilibrium = {"d_inner": 48, "d_state": 8, "d_head": 24, "n_patterns": 4}
    return DecoderConfig.from_dict({
        "vocab_size": 40, "d_model": d, "layers": layers, "plan": plan, "equilibrium": equilibrium,
        "tie_embeddings": False,
    })  # fmt: skip


NARROW = MixerOptions(d_head_v=8, tdc_width=8)
RECURRENT = {"d_inner": 64, "d_state": 8, "d_head": 32}
CONFIGS = {
    "transformer": lambda d: TransformerConfig(**sizes(d), n_heads=d // 32, n_kv_heads=1, d_ff=24),
    **{
        prior: lambda d, prior=prior: FEMLMConfig(**sizes(d), n_heads=2, d_ff=24, mixer=NARROW, prior=prior)
        for prior in ("rnn_softmax", "mamba")
    },
    "free_transformer": lambda d: FreeTransformerConfig(
        **sizes(d, n_layers=2), n_heads=d // 32, n_kv_heads=1, d_ff=24, n_latent_bits=BITS
    ),
    "mamba": lambda d: MambaConfig(**sizes(d), **RECURRENT),
    "mamba_hopfield": lambda d: MambaHopfieldConfig(**sizes(d), **RECURRENT, n_patterns=4),
    "hybrid": hybrid,
}


def built(config):
    kind = next(kind for kind in MODELS.values() if kind.config_class is type(config))
    torch.manual_seed(0)
    return kind(config)


def by_the_rule(model):
    """``(name, weight, fan_in, factor)`` of what goes by its fan-in; the factor is that of residual branches."""
    writers = [writer for block in model.blocks for writer in block.writers]
    own = ("tdc.out_proj", "u_proj", "start_proj")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.endswith(own):
            weight = module.weight
            if hasattr(model.get_submodule(name.rpartition(".")[0]), "step_sizes") and name.endswith(
                "in_proj"
            ):
                weight = weight[-2:]  # the rows of the step sizes
            factor = len(writers) ** -0.5 if module in writers else 1.0
            yield name, weight.detach(), module.weight.shape[1], factor
    if model.encoder is not None:
        yield "query", model.encoder.query.detach(), model.config.d_model, 1.0
        yield "table", model.post_sampler.weight.detach(), model.config.d_model, 1.0


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_map_and_embedding_goes_by_its_fan_in(name, d):
    model = built(CONFIGS[name](d))
    found = list(by_the_rule(model))
    assert len(found) > 3
    for path, weight, fan_in, factor in found:
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(factor * (3 * fan_in) ** -0.5, rel=error), path


@pytest.mark.parametrize("d", WIDTHS[:3])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_constant_for_all_of_them(name, d):
    model = built(replace(CONFIGS[name](d), initializer_range=0.02))
    for path, weight, _, factor in by_the_rule(model):
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(0.02 * factor, rel=error), path


@pytest.mark.parametrize("d", WIDTHS)
def test_logits_of_a_new_model_have_one_scale_at_every_width(d):
    for tied in (True, False):
        model = built(replace(CONFIGS["transformer"](d), tie_embeddings=tied))
        with torch.no_grad():
            logits = model(torch.arange(32).view(2, 16)).logits
        others = logits[..., 32:]  # of a tied model the token that is read answers itself
        assert others.std().item() == pytest.approx(3**-0.5, rel=0.2)


@pytest.mark.parametrize("value", [0.0, -0.02, math.nan])
def test_the_constant_is_a_positive_number(value):
    with pytest.raises(ValueError, match="initializer_range must be"):
        TransformerConfig.from_dict({"vocab_size": 5, "initializer_range": value})


def test_a_config_holds_the_constant_only_where_it_is_set(tmp_path):
    plain = CONFIGS["transformer"](64)
    assert "initializer_range" not in plain.to_dict() and plain.initializer_range is None
    constant = replace(plain, initializer_range=0.02)
    assert constant.to_dict() == plain.to_dict() | {"initializer_range": 0.02}
    for config in (plain, constant):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
        save_checkpoint(model := built(config), tmp_path / str(config.initializer_range))
        loaded = load_checkpoint(tmp_path / str(config.initializer_range))
        assert loaded.config == config
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("folder", sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir()))
def test_configs_from_before_the_choice_load_as_they_are(folder):
    written = json.loads((CHECKPOINTS / folder / "config.json").read_text())
    assert "initializer_range" not in json.dumps(written)
    assert load_checkpoint(CHECKPOINTS / folder).config.initializer_range is None
