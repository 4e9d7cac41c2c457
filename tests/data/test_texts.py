"""Texts handed over one by one become the tokens that files of them would."""

import json

import pytest
import torch

from helmholtz.data import DataConfig, prepare, prepare_texts

TEXTS = ["one\ntwo", "", "dr\u00ef \u2028 vier", *(f"text {i}\r\n" for i in range(60))]


def config(folder, **changes):
    return DataConfig(folder=str(folder), tokenizer="bytes", **changes)


def contents(dataset, tokenizer):
    stream = dataset.read(torch.tensor([0]), len(dataset))[0].tolist()
    ends = [*dataset.document_starts.tolist()[1:], len(stream)]
    return [
        tokenizer.decode(stream[a:b]) for a, b in zip(dataset.document_starts.tolist(), ends, strict=True)
    ]


def test_they_are_split_like_the_lines_of_a_file(tmp_path):
    data = prepare_texts(config(tmp_path / "tokens", validation_fraction=0.9), (text for text in TEXTS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    wanted = prepare(
        config(tmp_path / "wanted", validation_fraction=0.9, sources=(str(tmp_path / "train.jsonl"),))
    )
    for split in ("train", "validation"):
        assert contents(getattr(data, split), data.tokenizer) == contents(
            getattr(wanted, split), data.tokenizer
        )
    assert data.metadata.split_by == wanted.metadata.split_by == "document"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "train.jsonl", "wanted"]


def test_given_validation_texts_are_the_validation_split(tmp_path):
    data = prepare_texts(config(tmp_path / "tokens"), TEXTS[:10], TEXTS[10:])
    assert contents(data.train, data.tokenizer) == [text for text in TEXTS[:10] if text]
    assert contents(data.validation, data.tokenizer) == TEXTS[10:]
    assert data.metadata.split_by == "source"
    assert prepare_texts(config(tmp_path / "tokens"), TEXTS[:10], TEXTS[10:]).reused
    for train, validation in ((TEXTS[:10], TEXTS[11:]), (TEXTS[:11], TEXTS[11:]), (TEXTS, None)):
        with pytest.raises(ValueError, match="was prepared differently: other text"):
            prepare_texts(config(tmp_path / "tokens"), train, validation)


def test_validation_files_are_the_validation_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n")
    a, b = (str(tmp_path / f"{name}.txt") for name in ("a", "b"))
    data = prepare(config(tmp_path / "tokens", sources=(a,), validation_sources=(b,)))
    assert contents(data.train, data.tokenizer) == ["text of a\n"]
    assert contents(data.validation, data.tokenizer) == ["text of b\n"]
    with pytest.raises(ValueError, match="other text"):
        prepare(config(tmp_path / "tokens", sources=(a,), validation_sources=(a,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_sources": ("b.txt",)}, "sources must be given if validation_sources are"),
        ({"sources": ("a",), "validation_sources": ("b",), "seed": 2}, "seed: got 2, but validation_sources"),
        ({"sources": ("a",), "validation_sources": ("b",), "split_by": "tail"}, "split_by: got 'tail', but"),
    ],
)
def test_settings_that_would_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": (), "validation_sources": ()} | settings)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([], None, "train: no text came"),
        (["", ""], None, "train: no text came"),
        (["a"], [""], "validation: no text came"),
        (["a", None], None, "train text 1 must be a string, got NoneType"),
        (["a"], ["b", b"c"], "validation text 1 must be a string, got bytes"),
        (["\ud800"], None, "train text 0 is not text"),
    ],
)
def test_what_is_no_text_is_refused_and_nothing_is_left(tmp_path, train, validation, message):
    with pytest.raises(ValueError, match=message):
        prepare_texts(config(tmp_path / "tokens"), train, validation)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_source_is_handed_on_and_nothing_is_left(tmp_path):
    def broken():
        yield "a"
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        prepare_texts(config(tmp_path / "tokens"), broken())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="sources must be empty if texts are handed over"):
        prepare_texts(config(tmp_path / "tokens", sources=("a.txt",)), ["a"])


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    (tmp_path / ".tokens.texts").mkdir()
    (tmp_path / ".tokens.texts" / "train.jsonl").write_text("half a li")
    data = prepare_texts(config(tmp_path / "tokens"), ["a"], ["b"])
    assert contents(data.train, data.tokenizer) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_memory_holds_one_text_at_a_time(tmp_path):
    alive, most = 0, 0

    class Text(str):
        def __new__(cls, value):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, value)

        def __del__(self):
            nonlocal alive
            alive -= 1

    prepare_texts(config(tmp_path / "tokens"), (Text(f"text {i}\n") for i in range(200)), ["b"])
    assert most <= 3
