import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

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


@given(st.lists(st.integers(0, 254)))  # 255 pads
def test_bytes_that_are_no_text_decode_as_ours(ids):
    ours, theirs = PAIRS["bytes"]
    assert theirs.decode(ids) == ours.decode(ids)


def test_the_end_token_is_ours_and_only_asked_for_read_as_one(pair):
    ours, theirs = pair
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos_id
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
    assert batch["input_ids"][0] == [theirs.pad_token_id] * (width - short) + ours.encode("love")
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
    assert theirs.pad_token_id == 1201  # an id of its own, where none is free


@pytest.fixture(params=[*PAIRS, "ids"])
def any_pair(request):
    ids = IdTokenizer(1200)
    return PAIRS.get(request.param) or (ids, to_transformers(ids, max_seq_len=64))


def test_collators_ask_for_ends_and_for_no_pads(any_pair):
    ours, theirs = any_pair
    rows = [[1, 2, 3, ours.eos_id], [4, ours.eos_id]]
    batch = DataCollatorForLanguageModeling(theirs, mlm=False)([{"input_ids": row} for row in rows])
    pad = theirs.pad_token_id
    assert pad != ours.eos_id
    assert batch["input_ids"].tolist() == [rows[0], [pad, pad, *rows[1]]]
    assert batch["labels"].tolist() == [rows[0], [-100, -100, *rows[1]]]


def test_a_pad_is_no_text(pair):
    """So its id may pad: a vocabulary of the model's size has a token for it."""
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size > theirs.pad_token_id
    assert theirs.pad_token_id not in {
        i for text in [*TEXTS, "ÿ", "<|pad|>"] for i in theirs(text)["input_ids"]
    }
    assert ours.decode([theirs.pad_token_id]) == "\ufffd"  # no whole character either
    assert theirs.decode([theirs.pad_token_id], skip_special_tokens=True) == ""
    assert theirs("<|pad|>", split_special_tokens=False)["input_ids"] == [theirs.pad_token_id]
