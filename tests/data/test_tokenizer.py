"""Text survives both tokenizers exactly, and no text can forge the end of a document."""

import builtins
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmholtz.data import BPETokenizer, ByteTokenizer, load_tokenizer

TEXTS = [
    "To be, or not to be: that is the question.\n" * 3,
    "  naïve café \t\r\n\n — 日本語 🎭 <|endoftext|>\x00",
]
BPE = BPETokenizer.train(TEXTS * 3, 300)
ANY_TEXT = st.text(st.characters(codec="utf-8"))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=ANY_TEXT)
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.eos_id for i in ids)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_saved_tokenizer_encodes_the_same(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.vocab_size - 1)
    assert loaded.encode(text) == tokenizer.encode(text)


def test_bytes_are_the_bytes_of_utf8():
    assert ByteTokenizer().encode("é!") == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().vocab_size == 257


def test_training_is_repeatable_merges_frequent_pairs_and_keeps_to_the_size():
    again = BPETokenizer.train(TEXTS * 3, 300)
    assert again.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert BPE.vocab_size <= 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert BPETokenizer.train(["ab"], 10_000).vocab_size == 258  # 256 bytes, one merge, the end token


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_decoding_leaves_out_ends_and_refuses_unknown_ids(tokenizer):
    ids = tokenizer.encode("To be")
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "To beTo be"
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {tokenizer.vocab_size}\).*got {bad}"):
            tokenizer.decode([bad])


def test_part_of_a_character_decodes_to_the_replacement_character():
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 258, got 257"):
        BPETokenizer.train(TEXTS, 257)


def test_damaged_tokenizer_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="kind.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "kind.json").write_text(json.dumps({"kind": "byte"}))
    with pytest.raises(ValueError, match="'byte'; did you mean 'bytes'"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_package_gives_the_install_command(monkeypatch):
    real = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match=r"pip install 'helmholtz-nn\[data\]'"):
        BPETokenizer.train(TEXTS, 300)
