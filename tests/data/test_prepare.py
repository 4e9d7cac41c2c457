"""Preparing is complete or does not happen, is done once, and never destroys what it does not own."""

import errno
import io
import json
import resource

import pytest
import torch
from rich.console import Console

from helmholtz.data import DataConfig, corpus, prepare
from helmholtz.data.tokenizer import BPETokenizer, ByteTokenizer

LINE = "The quality of mercy is not strain'd. ünd\n"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for name, n_lines in [("a.txt", 40), ("b.txt", 60)]:
        (tmp_path / "text" / name).write_text("".join(f"{name} {i} {LINE}" for i in range(n_lines)))
    return tmp_path / "text"


@pytest.fixture
def config(tmp_path, text):
    def make(**changes):
        settings = {"folder": str(tmp_path / "tokens"), "sources": (str(text),), "tokenizer": "bytes"}
        return DataConfig(**settings | {"validation_fraction": 0.2} | changes)

    return make


def contents(dataset, tokenizer):
    stream = dataset.read(torch.tensor([0]), len(dataset))[0].tolist()
    ends = [*dataset.document_starts.tolist()[1:], len(stream)]
    return [
        tokenizer.decode(stream[a:b]) for a, b in zip(dataset.document_starts.tolist(), ends, strict=True)
    ]


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_both_splits_together_are_the_text(config, text, tokenizer):
    size = {} if tokenizer == "bytes" else {"vocab_size": 320}
    data = prepare(config(tokenizer=tokenizer, **size))
    train, validation = (contents(d, data.tokenizer) for d in (data.train, data.validation))
    assert [a + b for a, b in zip(train, validation, strict=True)] == [
        (text / name).read_text() for name in ("a.txt", "b.txt")
    ]
    for dataset, parts in ((data.train, train), (data.validation, validation)):
        assert dataset.n_bytes == sum(len(part.encode()) for part in parts)
        assert len(dataset) == sum(len(data.tokenizer.encode(part)) + 1 for part in parts)
    assert data.validation.n_bytes / (data.train.n_bytes + data.validation.n_bytes) == pytest.approx(
        0.2, abs=0.02
    )
    assert data.metadata.vocab_size == data.tokenizer.vocab_size == {"bytes": 257, "bpe": 320}[tokenizer]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_tokens_and_merges_are_those_of_the_whole_text_however_little_is_read_at_once(
    config, text, tmp_path, monkeypatch, block
):
    verse = "If music be\r\n\r\n\t\tthe   food of love,\n\n\n  play on; it's\xa0日本語  2 345  \n \n"
    (text / "a.txt").write_bytes((verse * 12).encode() + b"   no newline at the end\n\n  .")
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
    data = prepare(config(tokenizer="bpe", vocab_size=290))
    for dataset in (data.train, data.validation):
        stream = dataset.read(torch.tensor([0]), len(dataset))[0].tolist()
        encode, eos = data.tokenizer.encode, data.tokenizer.eos_id
        wanted = [ids for part in contents(dataset, data.tokenizer) for ids in (*encode(part), eos)]
        assert stream == wanted
    BPETokenizer.train(contents(data.train, data.tokenizer), 290).save(tmp_path / "whole")
    assert snapshot(data.folder / "tokenizer") == snapshot(tmp_path / "whole")


def test_preparing_again_is_the_same_to_the_byte(config, tmp_path):
    first = prepare(config(tokenizer="bpe", vocab_size=300))
    second = prepare(config(tokenizer="bpe", vocab_size=300, folder=str(tmp_path / "again")))
    assert snapshot(first.folder) == snapshot(second.folder)


def test_the_tokenizer_does_not_see_the_validation_text(config, text):
    (text / "a.txt").write_text("".join(f"{i}\n" for i in range(200)) + "zqzqzqzq\n" * 15)
    (text / "b.txt").unlink()
    data = prepare(config(tokenizer="bpe", vocab_size=400))
    assert "zq" in contents(data.validation, data.tokenizer)[0]
    assert len(data.tokenizer.encode("zqzq")) == 4


def test_many_documents_are_split_whole_and_few_by_their_tails(config, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)))
    data = prepare(config(sources=(str(path),)))
    assert data.metadata.split_by == "document"
    train, validation = (contents(d, ByteTokenizer()) for d in (data.train, data.validation))
    assert sorted(train + validation) == sorted(f"document {i}" for i in range(300))
    assert 40 < len(validation) < 80
    few = prepare(config(folder=str(tmp_path / "few"), sources=(str(path),), validation_fraction=0.1))
    assert few.metadata.split_by == "tail"


def test_a_prepared_folder_is_reused_from_anywhere(config, text):
    first = prepare(config())
    before = snapshot(first.folder)
    moved = text.rename(text.with_name("moved"))
    again = prepare(config(sources=(str(moved),)), overwrite=True)
    assert not first.reused and again.reused
    assert snapshot(again.folder) == before


def test_other_settings_and_other_text_are_refused_unless_overwriting_is_allowed(config, text):
    first = prepare(config())
    before = snapshot(first.folder)
    with pytest.raises(
        ValueError, match=r"validation_fraction is 0\.2 there, 0\.3 is wanted.*allow overwriting"
    ):
        prepare(config(validation_fraction=0.3))
    (text / "a.txt").write_text("changed\n" * 100)
    with pytest.raises(ValueError, match="was prepared differently: other text"):
        prepare(config())
    assert snapshot(first.folder) == before
    assert "changed" in contents(prepare(config(), overwrite=True).train, ByteTokenizer())[0]


def test_a_damaged_folder_is_refused_and_can_be_overwritten(config):
    data = prepare(config())
    (data.folder / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.bin has 0 bytes.*allow overwriting"):
        prepare(config())
    assert not prepare(config(), overwrite=True).reused


def test_a_folder_of_something_else_is_never_touched(config, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds something else than prepared text"):
            prepare(config(), overwrite=overwrite)
    assert (tmp_path / "tokens" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_the_folder_as_it_was(config, text, tmp_path, monkeypatch, overwrite):
    if overwrite:
        prepare(config())
        (text / "a.txt").write_text("new\n" * 100)
    before = snapshot(tmp_path)

    def fail(self, text):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode", fail)
        with pytest.raises(OSError, match="no space left"):
            prepare(config(), overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_bad_text_is_found_before_anything_is_written(config, text, tmp_path):
    (text / "c.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(ValueError, match=r"c\.txt: not UTF-8 at byte 5"):
        prepare(config())
    assert not (tmp_path / "tokens").exists()


def test_empty_corpora_and_splits_are_named(config, text):
    for name in ("a.txt", "b.txt"):
        (text / name).write_text("")
    with pytest.raises(ValueError, match=r"sources: no text in .*a\.txt"):
        prepare(config())
    (text / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="no text came to the validation split; add text"):
        prepare(config())


def test_progress_is_shown_on_a_console_and_only_there(config, tmp_path, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    prepare(config(), console=console)
    assert "encoding" in console.file.getvalue() and "100%" in console.file.getvalue()
    prepare(config(folder=str(tmp_path / "quiet")))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocab_size must be 257 for tokenizer=bytes, got 300"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "vocab_size must be an integer of at least 258"),
        ({"validation_fraction": 0.0}, "validation_fraction must be in"),
        ({"validation_fraction": 1.0}, "validation_fraction must be in"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"folder": ""}, "folder must be the path of a folder"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"tokenizer": "bytes"} | changes)


@pytest.mark.parametrize(
    ("name", "value", "wanted"), [("tokenizer", "byte", "bytes"), ("split_by", "tails", "tail")]
)
def test_unknown_choices_suggest_the_nearest(name, value, wanted):
    config = DataConfig()
    object.__setattr__(config, name, value)  # the shape checks of the tests would refuse it before we can
    with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'; did you mean '{wanted}'"):
        config.__post_init__()


def test_a_write_that_the_disk_refuses_says_where_and_why_and_leaves_nothing(config, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2_000, hard)
    )  # as on a full disk: part of the file can be written
    try:
        with pytest.raises(OSError, match="tokens") as refused:
            prepare(config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
