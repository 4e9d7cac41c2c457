"""Text survives both tokenizers exactly, and no text can forge the end of a document."""

import builtins
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from helmholtz.data import BPETokenizer, ByteTokenizer, load_tokenizer
from helmholtz.data.tokenizer import LONGEST_WORD, IdTokenizer

TEXTS = [
    "To be, or not to be: that is the question.\n" * 3,
    "  naïve café \t\r\n\n — 日本語 🎭 <|endoftext|>\x00",
]
BPE = BPETokenizer.train(TEXTS * 3, 300)
ANY_TEXT = st.text(st.characters(codec="utf-8"))
WORDS_OF_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPACES = " \n\t\r\x0b\x1c\x85\xa0\u2028\u3000\ufeff"
WORDY = st.text(st.one_of(st.sampled_from(SPACES + "abs'tdl09!é日。🎭\u0301"), st.characters(codec="utf-8")))


def before_words_had_a_bound():
    """The same merges behind the words of GPT-2, as tokenizers were saved before."""
    saved = json.loads(BPE.copy_of_backend().to_str())
    saved["pre_tokenizer"] = json.loads(WORDS_OF_GPT2.__getstate__())
    return BPETokenizer(Tokenizer.from_str(json.dumps(saved)))


EARLIER = before_words_had_a_bound()


def cut(text, places):
    """``text`` in pieces, cut at the fractions ``places``."""
    ends = sorted(round(place * len(text)) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, EARLIER], ids=["bytes", "bpe", "earlier bpe"])
@given(text=WORDY, places=st.lists(st.floats(0, 1), max_size=8))
def test_the_ids_of_the_parts_are_those_of_the_whole(tokenizer, text, places):
    parts = list(tokenizer.parts(cut(text, places)))
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_parts_of_text_are_as_short_as_its_words():
    text = "To be,\n  or not " * 50
    assert max(map(len, BPE.parts(text))) < 10  # a piece is a character
    assert list(IdTokenizer(30).parts(["1 2", "3 4"])) == ["1 23 4"]


@given(WORDY)
def test_words_up_to_the_bound_are_those_of_gpt2(text):
    words = BPE.copy_of_backend().pre_tokenizer
    assert words.pre_tokenize_str(text) == WORDS_OF_GPT2.pre_tokenize_str(text)


@pytest.mark.parametrize("unit", [" ", "\n", "x", "7", "é", "日", "-", "\u0301"])
def test_no_word_is_longer_than_the_bound(unit):
    text = f"a{unit * (1 << 12)}b"
    words = BPE.copy_of_backend().pre_tokenizer.pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in words) <= LONGEST_WORD + 1
    assert BPE.decode(BPE.encode(text)) == text


def test_tokenizers_without_a_bound_encode_as_before(tmp_path):
    EARLIER.save(tmp_path)
    text = "a" * 1000 + " " * 1000 + "b"
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert max(len(word) for word, _ in plain.pre_tokenizer.pre_tokenize_str(text)) > 900
    assert load_tokenizer(tmp_path).encode(text) == plain.encode(text).ids


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, IdTokenizer(9)], ids=["bytes", "bpe", "ids"])
def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="text must be Unicode, got half a surrogate pair"):
        tokenizer.encode("a\udcff")


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
