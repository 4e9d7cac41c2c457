"""A run begins with the weights of an exported model; transformers is not asked."""

import itertools
import json
import shutil

import pytest
import torch

from helmholtz.data.tokenizer import BPETokenizer, ByteTokenizer, IdTokenizer, check_exported_tokenizer
from helmholtz.interop.hf import export
from helmholtz.interop.hf.tokenizer import to_transformers
from helmholtz.models.checkpoint import load_checkpoint, load_exported
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def test_a_run_begins_with_an_exported_model(data, run_folder, exported, tmp_path):
    train(
        tiny_run(
            data,
            tmp_path / "run",
            steps=2,
            warmup_steps=1,
            lr=1e-30,
            weight_decay=0.0,
            init_from=str(exported),
        )
    )
    one, two = (
        load_checkpoint(folder).state_dict() for folder in (run_folder / "best", tmp_path / "run" / "last")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    (event,) = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["history"]
    assert (event["from"], event["step"], event["changed"]) == (str(exported), None, None)
    assert event["weights"].keys() == {"model.safetensors"}


def test_an_exported_model_in_several_files_is_read_whole(run_folder, tmp_path):
    folder = export(run_folder, tmp_path / "shards", max_shard_size="10KB").folder
    assert len(list(folder.glob("*.safetensors"))) > 1
    one, two = load_checkpoint(run_folder / "best").state_dict(), load_exported(folder).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_another_tokenizer_or_a_missing_file_is_named(data, exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    run = tiny_run(data, tmp_path / "run", steps=2, warmup_steps=1, init_from=str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy: no weights here \(\*.safetensors\)"):
        train(run)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: wanted the tokenizer of an exported model"):
        train(run)
    tokenizer = BPETokenizer.train(["to be or not to be"], 258)
    to_transformers(tokenizer, max_seq_len=32).save_pretrained(copy)
    with pytest.raises(ValueError, match="is not the one the model was trained with"):
        train(run)
    assert not (tmp_path / "run").exists()


TEXTS = ["to be or not to be, that is the question", "whether it is nobler in the mind to suffer " * 3]


def test_every_kind_of_tokenizer_is_known_again(tmp_path):
    kinds = {
        "bytes": ByteTokenizer(),
        "bpe": BPETokenizer.train(TEXTS, 290),
        "other": BPETokenizer.train([text[::-1] for text in TEXTS], 290),
        "ids": IdTokenizer(9),
        "more": IdTokenizer(10),
    }
    for name, tokenizer in kinds.items():
        tokenizer.save(tmp_path / name)
        to_transformers(tokenizer, max_seq_len=32).save_pretrained(tmp_path / f"{name}-exported")
    for one, two in itertools.product(kinds, repeat=2):
        exported = tmp_path / f"{two}-exported" / "tokenizer.json"
        if one == two:
            check_exported_tokenizer(exported, tmp_path / one)
            continue
        with pytest.raises(ValueError, match="is not the one the model was trained with"):
            check_exported_tokenizer(exported, tmp_path / one)
