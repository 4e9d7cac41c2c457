"""The tokenizers of this library as tokenizers of transformers: the same ids for every text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from helmholtz._checks import check
from helmholtz.data.tokenizer import BYTES, AbstractTokenizer, BPETokenizer, ByteTokenizer, IdTokenizer

END = "<|endoftext|>"
"""Name of the end-of-document token. A text that spells it is text all the same."""


def to_transformers(tokenizer: AbstractTokenizer, *, max_seq_len: int) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that gives every text the ids of ``tokenizer``, and nothing besides.

    The end-of-document token ends, begins and pads; padding is on the left. Where a text spells its name it is read as
    text; a call with ``split_special_tokens=False`` reads the name as the token.

    Args:
        max_seq_len: what it warns of.
    """
    backend = _backend(tokenizer)
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    got, wanted = backend.token_to_id(END), tokenizer.eos_id
    check(got == wanted, f"tokenizer: the id of {END}", got, f"{wanted}, one more than all others")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
    )


def _backend(tokenizer: AbstractTokenizer) -> Tokenizer:
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.copy_of_backend()
    if isinstance(tokenizer, ByteTokenizer):
        backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return backend
    assert isinstance(tokenizer, IdTokenizer)
    backend = Tokenizer(models.WordLevel(vocab={str(i): i for i in range(tokenizer.eos_id)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """The byte of every character that byte-level tokenizers write for one.

    Printable characters of Latin-1 stand for their own byte; the other bytes, in their order, for the characters from
    256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + n): byte for n, byte in enumerate(others)}
