import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoder_cases import tokens_of
from helmholtz.interop.hf import HelmholtzForCausalLM, from_hf
from hf_cases import CORES, make


def reload(folder, **options):
    model, info = HelmholtzForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("name", CORES)
def test_saved_and_loaded_a_model_is_the_same_to_the_bit(name, tmp_path):
    model, tokens = make(name), tokens_of(2, 12)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    core = again.model
    tied = core.config.tie_embeddings
    assert (core.unembed.weight is core.embed.weight) == tied
    assert ("model.unembed.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert torch.equal(logits(HelmholtzForCausalLM.of(from_hf(tmp_path)), tokens), logits(model, tokens))


def test_a_written_memory_goes_with_the_weights_and_can_be_written_on(tmp_path):
    model = make("mamba-hopfield-slots-untied")
    model.save_pretrained(tmp_path)
    memory, again = model.model.memory, from_hf(tmp_path).memory
    assert torch.equal(again.slots, memory.slots) and int(again.occupied.sum()) == 5
    rows = torch.randn(6, 32)
    memory.write(rows, in_eval=True)
    again.write(rows, in_eval=True)
    assert torch.equal(again.slots, memory.slots)
    assert torch.equal(again.store.cursor, memory.store.cursor)


@pytest.mark.parametrize("name", ["fem-hybrid-untied", "mamba-hopfield-slots-untied", "free"])
def test_weights_in_many_files_are_the_same_weights(name, tmp_path):
    model, tokens = make(name), tokens_of(2, 12)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(reload(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["transformer", "mamba-hopfield-slots-untied"])
def test_dtypes_are_kept_or_chosen(name, tmp_path):
    model, tokens = make(name), tokens_of(1, 8)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    kept = reload(tmp_path)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(logits(kept, tokens), logits(model, tokens))
    wide = reload(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32 and wide.model.embed.weight.dtype == torch.float32
    assert from_hf(tmp_path, dtype=torch.float64).embed.weight.dtype == torch.float64


def test_a_new_model_is_initialised_as_the_models_are():
    config = make("transformer").config
    torch.manual_seed(5)
    ours = CORES["transformer"]()
    torch.manual_seed(5)
    theirs = HelmholtzForCausalLM(config).model
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("remove", "o_proj.weight' is missing"),
        ("add", "'model.blocks.9.weight' is not part of this model"),
        ("reshape", r"is of shape \(5, 32\), the config asks for \(32, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    make("transformer").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.blocks.0.mixer.o_proj.weight"
    weights = load_file(file)
    if change == "remove":
        del weights[name]
    elif change == "add":
        weights["model.blocks.9.weight"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:5].clone()
    save_file(weights, file, metadata={"format": "pt"})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=message):
            HelmholtzForCausalLM.from_pretrained(tmp_path, **options)


def test_folders_of_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="folder must be a local folder with a config.json"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="architecture must be one of"):
        from_hf(tmp_path)
