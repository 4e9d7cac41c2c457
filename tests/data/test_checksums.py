"""Prepared text and tokenizers that are not what was written are refused, whatever a reader makes of the bytes."""

import json
import shutil

import pytest
import torch

from helmholtz._files import CHECKSUMS, write_checksums
from helmholtz.data import DataConfig, TokenDataset, prepare
from helmholtz.data.rows import write_rows
from helmholtz.data.tokenizer import LARGEST_BPE, BPETokenizer, IdTokenizer, load_tokenizer
from helmholtz.data.tokens import check_contents
from helmholtz.training.run import train
from tiny_runs import tiny_run, write_text

ROWS = torch.arange(16).view(2, 8)


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("tokenizers")
    source = write_text(tmp_path / "text.txt", 800)
    return DataConfig(
        folder=str(tmp_path / "data"), sources=(str(source),), vocab_size=300, validation_fraction=0.1
    )


@pytest.fixture
def folder(config):
    return prepare(config).folder


def flip(file, position=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    file.write_bytes(content)


def test_everything_prepared_has_a_checksum(folder, tmp_path):
    write_rows(tmp_path / "rows", ROWS, ROWS, n_ids=16)
    for place in (folder, tmp_path / "rows"):
        sums = json.loads((place / CHECKSUMS).read_text())
        files = {
            str(path.relative_to(place))
            for path in place.rglob("*")
            if path.is_file() and path.name != CHECKSUMS
        }
        assert sums.keys() == files and {"train.bin", "tokenizer/kind.json"} <= files
        check_contents(place)


def test_a_token_that_has_become_another_one(config, folder):
    flip(folder / "train.bin", 0)  # still in the vocabulary
    for read in (
        lambda: TokenDataset(folder, "train"),
        lambda: check_contents(folder),
        lambda: prepare(config),
    ):
        with pytest.raises(
            ValueError, match=r"train.bin is damaged: it is not what was written.*prepare the text"
        ):
            read()
    TokenDataset(folder, "validation")
    assert not prepare(config, overwrite=True).reused
    check_contents(folder)


def test_rows_that_have_changed_are_written_anew_if_asked(tmp_path):
    write_rows(tmp_path, ROWS, ROWS, n_ids=16)
    flip(tmp_path / "train.bin", 0)
    with pytest.raises(ValueError, match="train.bin is damaged.*allow overwriting"):
        write_rows(tmp_path, ROWS, ROWS, n_ids=16)
    write_rows(tmp_path, ROWS, ROWS, n_ids=16, overwrite=True)
    assert torch.equal(TokenDataset(tmp_path, "train").read(torch.tensor([0]), 8)[0], ROWS[0])


def test_large_files_are_hashed_when_a_run_begins(config, folder, tmp_path, monkeypatch):
    flip(folder / "train.bin", 0)
    monkeypatch.setattr("helmholtz.data.tokens.CHECKED_BYTES", 0)
    TokenDataset(folder, "train")
    with pytest.raises(ValueError, match=r"train.bin is damaged"):
        train(tiny_run(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["kind.json", "tokenizer.json", "both"])
def test_a_run_without_a_tokenizer_does_not_begin(config, folder, tmp_path, what):
    for name in ("kind.json", "tokenizer.json") if what == "both" else (what,):
        (folder / "tokenizer" / name).unlink()
    run = tiny_run(config, tmp_path / "run")
    for checksums in (True, False):
        if not checksums:  # a folder that was prepared before there were any
            (folder / CHECKSUMS).unlink()
        with pytest.raises(ValueError, match="tokenizer"):
            train(run)
        assert not (tmp_path / "run").exists()


def test_every_bit_of_a_tokenizer_counts(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    before = file.read_bytes()
    positions = range(3, len(before), len(before) // 40)
    for position in positions:
        flip(file, position)
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged: it is not what was written"):
            load_tokenizer(folder / "tokenizer")
        file.write_bytes(before)
    assert load_tokenizer(folder / "tokenizer").vocab_size == 300


def test_what_has_no_checksums_is_read_as_before(folder, tmp_path):
    shutil.copytree(folder / "tokenizer", tmp_path / "alone" / "tokenizer")
    assert load_tokenizer(tmp_path / "alone" / "tokenizer").vocab_size == 300
    (folder / CHECKSUMS).unlink()
    check_contents(folder)
    assert len(TokenDataset(folder, "train")) > 0


def test_ids_with_a_gap_are_damage(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    token = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][token] = 10**9
    file.write_text(json.dumps(content))
    write_checksums(folder)
    with pytest.raises(ValueError, match="its 299 tokens do not have the ids 0 to 298"):
        load_tokenizer(folder / "tokenizer")


def test_vocabularies_beyond_memory_are_refused():
    with pytest.raises(ValueError, match=f"vocab_size must be at most {LARGEST_BPE}, got 1000000000"):
        DataConfig(vocab_size=10**9)
    with pytest.raises(ValueError, match=f"vocab_size must be at most {LARGEST_BPE}"):
        BPETokenizer.train(["a"], 10**9)
    with pytest.raises(ValueError, match="n_ids must be below"):
        IdTokenizer(2**32)
