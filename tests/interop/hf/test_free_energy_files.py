"""Models that read free energies on disk, under DistributedDataParallel, and in transformers' Trainer."""

import json

import pytest
import torch
import transformers

from foreign_models import DECODERS, ENCODERS, inputs, livened, make
from helmholtz.interop.hf.free_energy import GUARD, load_free_energy, use_free_energy

every_model = pytest.mark.parametrize("name", DECODERS + ENCODERS)


@every_model
@pytest.mark.parametrize("gates", ["channel", "head"])
def test_a_saved_model_comes_back_bit_for_bit(name, gates, tmp_path):
    model, given = make(name), inputs(name)
    use_free_energy(model, gates=gates, beta=0.7, cap=30.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = load_free_energy(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    states = model.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1]) and any("free_energy.alpha" in key for key in states[0])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_shards_dtypes_and_implementations_survive(tmp_path):
    model, given = livened("qwen2").bfloat16(), inputs("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_free_energy(tmp_path, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert load_free_energy(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_stay_tied(tmp_path):
    livened("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = load_free_energy(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_without_the_library_the_model_does_not_load_in_silence(tmp_path):
    model = livened("llama")
    model.save_pretrained(tmp_path)
    for door in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match=f'attn_implementation="{GUARD}"` is not supported'):
            door.from_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sdpa"
    )  # asked for
    assert not any("free_energy" in key for key in plain.state_dict())


def test_folders_that_do_not_hold_what_they_say(tmp_path):
    make("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"folder: .*plain' holds a model without free energy; load it with"):
        load_free_energy(tmp_path / "plain")
    livened("llama").save_pretrained(tmp_path / "other")
    path = tmp_path / "other/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"are not those of its config: \{'missing_keys': .*free_energy"):
        load_free_energy(tmp_path / "other")
    for architectures in (None, [], ["NoSuchModel"]):
        path.write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(ValueError, match=r"names the architectures .*, wanted a class of transformers"):
            load_free_energy(tmp_path / "other")
    path.write_text(json.dumps(config | {"helmholtz_free_energy": {"gate": "head"}}))
    with pytest.raises(
        ValueError, match="helmholtz_free_energy in config.json has no key 'gate'; did you mean"
    ):
        load_free_energy(tmp_path / "other")
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        load_free_energy(tmp_path / "other", attn_implementation="flex_attention")


def test_every_parameter_takes_part_under_distributed_data_parallel(tmp_path):
    """Otherwise its second forward pass raises."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = make("llama").train()
        use_free_energy(model, freeze=True)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            given = inputs("llama")
            parallel(**given, labels=given["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_trainer_trains_saves_and_resumes_it(tmp_path):
    tokens = torch.randint(2, 31, (16, 9), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer(steps):
        model = make("llama")
        use_free_energy(model, freeze=True)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, save_steps=3,
            use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    whole = trainer(6)
    whole.train()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    states = [t.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    loaded = load_free_energy(tmp_path / "checkpoint-6")
    assert torch.equal(loaded(tokens).logits, whole.model.eval()(tokens).logits)
