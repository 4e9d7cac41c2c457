"""Whatever bytes a text file holds: all are in the tokens, or one line says where the first bad one is."""

import json
import tempfile
from codecs import BOM_UTF8
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import call, examples, snapshot
from helmholtz.data.tokens import TokenDataset

pytestmark = pytest.mark.fuzz

PIECES = st.one_of(
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=10),
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xf0\x9f", b""]
    ),
    st.integers(1, 400).map(lambda n: b"word " * n),
)
CONTENT = st.one_of(st.lists(PIECES, max_size=12).map(b"".join), st.binary(max_size=200))
HUGE = st.tuples(
    st.integers(1, 3 << 19), st.sampled_from([b"x", "\u00fc".encode(), b"ab\n", b"\xff"]), CONTENT
)
"""A line of up to 3 MB, more than the reader takes at once."""


def prepare(folder, name, content, *more):
    (folder / name).write_bytes(content)
    target = folder / "tokens"
    found = call(
        "data",
        f"--data.sources=[{folder / name}]",
        f"--data.folder={target}",
        "--data.tokenizer=bytes",
        *more,
    )
    assert {path.name for path in folder.iterdir()} <= {name, "tokens"}, "something is left beside the output"
    assert target.exists() == (found.code == 0)
    return found, target


def stream(folder, split):
    dataset = TokenDataset(folder, split)
    return bytes(t for t in dataset.read(torch.tensor([0]), len(dataset))[0].tolist() if t < 256)


def check_text(content, *more):
    with tempfile.TemporaryDirectory() as name:
        found, target = prepare(Path(name), "a.txt", content, *more)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            assert f"a.txt: not UTF-8 at byte {error.start}" in found.err and found.code == 2
        else:
            if found.code:
                assert "no text" in found.err and len(content) < 60, found
            else:
                held = stream(target, "train") + stream(target, "validation")
                assert held == content.removeprefix(BOM_UTF8)


@examples(0.6)
@given(CONTENT)
@example(b"")
@example(b"\xef\xbb\xbf" + b"a line\r\n" * 40)
@example(b"no newline at the end " * 10)
def test_text(content):
    check_text(content)


@examples(0.06)
@given(HUGE)
def test_huge_lines(parts):
    n, unit, end = parts
    check_text(unit * (n // len(unit)) + end)


def lines_as_json(content, field):
    """The documents of a JSON Lines file; None if it is not one."""
    documents = []
    for line in content.removeprefix(BOM_UTF8).split(b"\n"):
        try:
            text = line.decode()
            if not text.strip():
                continue
            value = json.loads(text)[field]
            value.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
            return None
        documents.append(value)
    return [document for document in documents if document]


RECORDS = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=200)}, optional={"more": st.integers()}).map(json.dumps),
    st.fixed_dictionaries({"text": st.text(max_size=200)}).map(
        lambda record: json.dumps(record, ensure_ascii=False)
    ),
    st.sampled_from(
        ["", " ", "\r", '{"text": 3}', '{"txt": "a"}', "[1]", '"text"', "null", "{", "NaN", '{"text": NaN}']
    ),
    st.sampled_from(['{"text": "\\ud800"}', '{"text": "\\u0000"}', '{"text": ""}', "[" * 5000, "9" * 5000]),
)
JSON_LINES = st.one_of(
    st.lists(RECORDS.map(lambda record: record.encode("utf-8", "surrogatepass")), max_size=8).map(b"\n".join),
    st.lists(st.text(min_size=20, max_size=60).map(lambda text: json.dumps({"text": text}).encode()), min_size=2,
             max_size=8).map(b"\n".join),
    CONTENT,
)  # fmt: skip


@examples(0.6)
@given(JSON_LINES)
@example(BOM_UTF8 + b'{"text": "a line of text"}\r\n' * 9)
@example(b"[" * 5000)
@example(b"9" * 5000)
def test_json_lines(content):
    with tempfile.TemporaryDirectory() as name:
        found, target = prepare(
            Path(name), "a.jsonl", content, "--data.split_by=document", "--data.validation_fraction=0.5"
        )
        documents = lines_as_json(content, "text")
        if documents is None:
            assert found.code == 2 and "a.jsonl, line " in found.err, found
        elif found.code:
            assert "no text" in found.err
        else:
            held = stream(target, "train") + stream(target, "validation")
            assert sorted(held) == sorted("".join(documents).encode())


@examples(0.2)
@given(CONTENT, CONTENT)
def test_another_text_never_replaces_a_prepared_folder(first, second):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, target = prepare(folder, "a.txt", first + b"a line of text\n" * 20)
        if found.code:
            return
        before = snapshot(target)
        (folder / "a.txt").write_bytes(second)
        again = call(
            "data",
            f"--data.sources=[{folder / 'a.txt'}]",
            f"--data.folder={target}",
            "--data.tokenizer=bytes",
        )
        assert again.code == 2 and snapshot(target) == before
