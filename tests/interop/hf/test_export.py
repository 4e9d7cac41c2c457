import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoder_cases import SIZES, tokens_of
from helmholtz.cli.main import main
from helmholtz.data.tokenizer import ByteTokenizer, IdTokenizer, load_tokenizer
from helmholtz.interop.hf import export, from_hf, register
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from hf_cases import make


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def save(name, folder):
    """A checkpoint with a tokenizer of bytes, as training writes it."""
    save_checkpoint(make(name).model, folder)
    ByteTokenizer().save(folder / "tokenizer")


def test_the_exported_model_is_the_best_of_the_run(run_folder, exported):
    core, tokens = load_checkpoint(run_folder / "best"), tokens_of(2, 20, vocabulary=257)
    register()
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, core(tokens).logits)
        assert torch.equal(from_hf(exported)(tokens).logits, core(tokens).logits)
    tokenizer, ours = (
        AutoTokenizer.from_pretrained(exported),
        load_tokenizer(run_folder / "best" / "tokenizer"),
    )
    assert tokenizer("the king")["input_ids"] == ours.encode("the king")
    assert model.generation_config.eos_token_id == ours.eos_id
    prompt = tokenizer("<|endoftext|>the", return_tensors="pt", split_special_tokens=False)
    assert prompt["input_ids"][0, 0] == ours.eos_id
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= 8


def test_the_card_says_what_is_known(run_folder, exported):
    text = (exported / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc0-1.0"
    assert head["library_name"] == "helmholtz"
    assert head["pipeline_tag"] == "text-generation"
    assert "transformer" in head["tags"]
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    best = min((r for r in records if r["kind"] == "eval"), key=lambda r: r["validation_loss"])
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (
        f"| validation bits per byte as training measured it | {best['validation_bits_per_byte']:.4f} |"
        in text
    )
    assert f"| parameters | {summary['parameters']:,} |" in text
    assert "| training data | data |" in text
    assert f"| trained by commit | {summary['commit']} |" in text
    assert str(run_folder) not in text  # no path of the machine
    assert 'from_pretrained("tiny")' in text


def test_a_tokenizer_that_does_not_fit_is_refused(capsys, tmp_path):
    save("free", tmp_path / "checkpoint")
    # a vocabulary of 37 does not fit bytes
    code, _, error = call(capsys, "export", tmp_path / "checkpoint", tmp_path / "out")
    assert code == 2 and "tokenizer.vocab_size must be 37, the model's vocabulary, got 257" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_bare_checkpoint_has_no_history(capsys, run_folder, tmp_path):
    code, out, error = call(capsys, "export", run_folder / "best", tmp_path / "out", "--max_shard_size=20KB")
    assert (code, error) == (0, "")  # no bar of transformers
    assert f"hf upload <user>/<name> {tmp_path / 'out'}" in out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "bits per byte" not in text and "training data" not in text
    assert "license: unknown" in text
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    tokens = tokens_of(1, 9, vocabulary=257)
    with torch.no_grad():
        assert torch.equal(
            from_hf(tmp_path / "out")(tokens).logits, load_checkpoint(run_folder / "best")(tokens).logits
        )


def test_nothing_is_overwritten_and_mistakes_are_one_line(capsys, run_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for arguments, message in [
        ((run_folder, tmp_path / "full"), "a new or an empty folder: nothing is overwritten"),
        ((tmp_path / "nowhere", tmp_path / "out"), "neither a checkpoint (config.json) nor a run"),
        ((run_folder, tmp_path / "out", "--license="), "license must be an identifier"),
        (
            (run_folder, tmp_path / "out", "--max_shard_size=abc"),
            "max_shard_size must be a number of KB, MB, GB or TB, as 200MB, got 'abc'",
        ),
        ((run_folder, tmp_path / "out", "--licence=mit"), "did you mean 'license'?"),
    ]:
        code, _, error = call(capsys, "export", *arguments)
        assert code == 2 and message in error, error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out").exists()


def test_the_card_s_prompt_is_one_also_where_tokens_are_no_text(tmp_path):
    save_checkpoint(make("transformer").model, tmp_path / "checkpoint")
    IdTokenizer(SIZES["vocab_size"] - 1).save(tmp_path / "checkpoint" / "tokenizer")
    folder = export(tmp_path / "checkpoint", tmp_path / "out").folder
    (prompt,) = re.findall(r'tokenizer\("(.*)", return_tensors', (folder / "README.md").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(prompt, split_special_tokens=False)["input_ids"] == [SIZES["vocab_size"] - 1, 0]


def test_an_unfinished_run_is_refused(run_folder, tmp_path):
    (tmp_path / "run").symlink_to(run_folder)
    summary = json.loads((run_folder / "summary.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("run.json", "metrics.jsonl", "best"):
        (copy / name).symlink_to(run_folder / name)
    (copy / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    with pytest.raises(ValueError, match="interrupted at step"):
        export(copy, tmp_path / "out")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    save_checkpoint(make("transformer").model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="wanted the kind of a saved tokenizer"):
        export(tmp_path / "checkpoint", tmp_path / "out")


def test_a_folder_from_before_pads_had_a_token_loads(exported, tmp_path):
    """There the end token pads."""
    folder = shutil.copytree(exported, tmp_path / "old")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        assert values.pop("pad_token_id") == 255
        values |= {"pad_token_id": 256} if name.startswith("generation") else {}
        values.pop("use_cache", None)
        (folder / name).write_text(json.dumps(values))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != "<|pad|>"
    ]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ÿ"] = vocabulary.pop("<|pad|>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    register()
    old, new = (AutoTokenizer.from_pretrained(path) for path in (folder, exported))
    model = AutoModelForCausalLM.from_pretrained(folder)
    batch = old(["the king", "of"], padding=True, return_tensors="pt")
    assert old.pad_token_id == old.eos_token_id and batch["input_ids"][1, 0] == 256
    texts = model.generate(**batch, max_new_tokens=4, do_sample=False)
    batch = new(["the king", "of"], padding=True, return_tensors="pt")
    again = AutoModelForCausalLM.from_pretrained(exported).generate(
        **batch, max_new_tokens=4, do_sample=False
    )
    assert old.batch_decode(texts, skip_special_tokens=True) == new.batch_decode(
        again, skip_special_tokens=True
    )
    assert (exported / "README.md").read_text().count("HelmholtzTrainer") == 1
