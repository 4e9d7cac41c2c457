import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import AutoTokenizer

from helmholtz.data.tokenizer import BPETokenizer, ByteTokenizer, IdTokenizer
from helmholtz.interop.hf import to_transformers
from tiny_runs import WORDS

BPE = BPETokenizer.train([" ".join(WORDS), "\tcafé 東京\n"], 300)
PAIRS = {
    name: (ours, to_transformers(ours, max_seq_len=64))
    for name, ours in [("bytes", ByteTokenizer()), ("bpe", BPE)]
}
TEXTS = [
    "",
    " ",
    "the king\n\n shall  speak",
    "\x00\x7f\x80\xad\xa0ÿĀ",
    "e\u0301 é",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "🜂 𝔘",
]


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def same(ours, theirs, text):
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_ours_and_every_text_comes_back(pair, text):
    same(*pair, text)


@given(st.text())
def test_ids_of_any_text_are_ours(text):
    for ours, theirs in PAIRS.values():
        same(ours, theirs, text)


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_decode_as_ours(ids):
    ours, theirs = PAIRS["bytes"]
    assert theirs.decode(ids) == ours.decode(ids)


def test_the_end_token_is_ours_and_only_asked_for_read_as_one(pair):
    ours, theirs = pair
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    ids = [*ours.encode("the king"), ours.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "the king"
    assert theirs("<|endoftext|>a", split_special_tokens=False)["input_ids"] == [
        ours.eos_id,
        *ours.encode("a"),
    ]
    assert ours.eos_id not in theirs("<|endoftext|>a")["input_ids"]


def test_batches_are_padded_on_the_left(pair):
    ours, theirs = pair
    batch = theirs(["love", "love and war"], padding=True)
    width = len(ours.encode("love and war"))
    short = len(ours.encode("love"))
    assert batch["input_ids"][0] == [ours.eos_id] * (width - short) + ours.encode("love")
    assert batch["attention_mask"][0] == [0] * (width - short) + [1] * short


def test_saved_and_loaded_it_is_the_same(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        same(ours, again, text)
    assert again.model_max_length == 64
    assert again.padding_side == "left"
    assert again.eos_token_id == ours.eos_id


def test_ids_that_never_were_text(tmp_path):
    ours = IdTokenizer(1200)
    theirs = to_transformers(ours, max_seq_len=64)
    same(ours, theirs, "0 7 1199 12")
    assert theirs.eos_token_id == 1200
