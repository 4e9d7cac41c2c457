import dataclasses
import importlib.util
import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import helmholtz.interop.hf
from decoder_cases import SIZES
from helmholtz.interop.hf import HelmholtzConfig, HelmholtzForCausalLM, register
from helmholtz.models import MODELS
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformerConfig
from hf_cases import CORES, RECURRENT, of_architecture


@pytest.mark.parametrize("name", CORES)
def test_a_config_is_complete_and_comes_back_equal(name, tmp_path):
    core = CORES[name]().config
    architecture = name.split("-")[0]
    names = {"fem": "fem_lm", "free": "free_transformer", "hybrid": "decoder"}
    architecture = (
        "mamba_hopfield" if name.startswith("mamba-hopfield") else names.get(architecture, architecture)
    )
    config = HelmholtzConfig.of(architecture, core)
    assert config.core_config() == core
    config.save_pretrained(tmp_path)
    again = HelmholtzConfig.from_pretrained(tmp_path)
    assert again.core_config() == core
    assert (again.core, again.objective) == (config.core, config.objective)
    # a later change of a default does not reach it
    assert json.loads((tmp_path / "config.json").read_text())["core"] == json.loads(
        json.dumps(core.to_dict())
    )


def test_what_is_not_given_is_written_down():
    assert "d_ff" not in SIZES
    assert HelmholtzConfig(architecture="transformer", core=SIZES).core["d_ff"] == 88


def test_sizes_have_their_usual_names():
    config = HelmholtzConfig.of("transformer", CORES["transformer"]().config)
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.max_position_embeddings)
    assert sizes == (37, 32, 2, 64)
    assert config.tie_word_embeddings and config.rms_norm_eps == 1e-6
    heads = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert heads == (4, 4, 88)
    config = HelmholtzConfig.of("mamba", CORES["mamba"]().config)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 64)
    config.num_attention_heads = 8
    assert config.core_config().d_head == 8
    with pytest.raises(ValueError, match="num_attention_heads must divide d_inner"):
        config.num_attention_heads = 7


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_set_by_their_usual_names(name, tmp_path):
    config = of_architecture(name).config
    config.vocab_size, config.tie_word_embeddings = 40, False
    if name == "decoder":  # which has its layers one by one
        with pytest.raises(ValueError, match="a decoder has none of n_layers"):
            config.num_hidden_layers = 3
    else:
        config.num_hidden_layers = 3
    core = config.core_config()
    n_layers = 2 if name == "decoder" else 3
    assert (core.vocab_size, core.tie_embeddings, core.n_layers) == (40, False, n_layers)
    assert config.num_hidden_layers == n_layers
    config.save_pretrained(tmp_path)
    again = HelmholtzConfig.from_pretrained(tmp_path, vocab_size=41)
    assert again.core_config() == dataclasses.replace(core, vocab_size=41)
    assert HelmholtzConfig(architecture=name, core=config.core, vocab_size=42).vocab_size == 42
    assert config.hidden_size % config.num_attention_heads == 0
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 1"):
        config.vocab_size = 0


def test_a_size_that_an_architecture_lacks_is_refused():
    config = of_architecture("mamba").config
    assert not hasattr(config, "num_key_value_heads")
    with pytest.raises(ValueError, match="a mamba has none of n_kv_heads"):
        config.num_key_value_heads = 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "architecture must be one of"),
        ({"architecture": "transfomer", "core": SIZES}, "did you mean 'transformer'"),
        ({"architecture": "transformer"}, "core must be the fields of the architecture's config, got None"),
        ({"architecture": "transformer", "core": SIZES | {"heads": 4}}, "has no key 'heads'"),
        ({"architecture": "transformer", "core": SIZES, "objective": {"kappa_bits": 1}}, "objective must be None"),
        ({"architecture": "transformer", "core": SIZES, "plan_seed": 1}, "plan_seed must be None for transformer"),
        ({"architecture": "mamba", "core": RECURRENT, "prompt_plan": "prior"}, "it has no plan"),
        ({"architecture": "free_transformer", "core": SIZES, "objective": {"kappa": 1}}, "has no key 'kappa'"),
        (
            {"architecture": "free_transformer", "core": SIZES, "objective": {"kappa_bits": -1}},
            "objective.kappa_bits must be a finite number of at least 0, got -1",
        ),
        ({"architecture": "free_transformer", "core": SIZES, "plan_seed": -1}, "plan_seed must be an integer"),
        ({"architecture": "free_transformer", "core": SIZES, "prompt_plan": "me"}, "prompt_plan must be one of"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HelmholtzConfig(**fields)


def test_settings_of_plan_and_objective_are_filled_and_kept(tmp_path):
    core = FreeTransformerConfig(**SIZES)
    plain = HelmholtzConfig.of("free_transformer", core)
    assert (plain.plan_seed, plain.prompt_plan, plain.objective) == (0, "prior", {"kappa_bits": 0.5})
    chosen = HelmholtzConfig(
        architecture="free_transformer",
        core=core.to_dict(),
        plan_seed=7,
        prompt_plan="posterior",
        objective={"kappa_bits": 0.25},
    )
    chosen.save_pretrained(tmp_path)
    again = HelmholtzConfig.from_pretrained(tmp_path)
    assert (again.plan_seed, again.prompt_plan, again.objective) == (7, "posterior", {"kappa_bits": 0.25})


def test_the_auto_classes_know_the_models_after_register_and_only_then(tmp_path):
    HelmholtzForCausalLM(HelmholtzConfig.of("fem_lm", FEMLMConfig(**SIZES))).save_pretrained(tmp_path)
    register()
    register()
    assert type(AutoConfig.from_pretrained(tmp_path)) is HelmholtzConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HelmholtzForCausalLM


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    hidden = {"transformers"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in hidden else real(name, *a)
    )
    with pytest.raises(
        ImportError, match=r"needs the package transformers: pip install 'helmholtz-nn\[hf\]'"
    ):
        importlib.reload(helmholtz.interop.hf)
