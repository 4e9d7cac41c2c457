"""The tokenizers of this library as tokenizers of transformers: the same ids for every text."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from helmholtz._checks import check
from helmholtz.data.tokenizer import AbstractTokenizer, BPETokenizer, ByteTokenizer, IdTokenizer

END, PAD = "<|endoftext|>", "<|pad|>"
"""Names of the end-of-document token and of pads. A text that spells one is text all the same."""
NEVER_TEXT = 0xFF
"""A byte that UTF-8 does not have, so that its token is free to pad."""


def to_transformers(tokenizer: AbstractTokenizer, *, max_seq_len: int) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that gives every text the ids of ``tokenizer``, and nothing besides.

    The end-of-document token ends and begins. Pads have a token of their own: collators ask for no pads, and would ask
    for no ends either. It is that of the byte FF, which no text has; where there are no bytes it is one id more than
    the model has, which a ``HelmholtzForCausalLM`` knows as a pad. Padding is on the left. Where a text spells the name
    of a token it is read as text; a call with ``split_special_tokens=False`` reads the name as the token.

    Args:
        max_seq_len: what it warns of.
    """
    backend = _backend(tokenizer)
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    got, wanted = backend.token_to_id(END), tokenizer.eos_id
    check(got == wanted, f"tokenizer: the id of {END}", got, f"{wanted}, one more than all others")
    backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
    )


def _backend(tokenizer: AbstractTokenizer) -> Tokenizer:
    if isinstance(tokenizer, BPETokenizer):
        return _with_pad(tokenizer.copy_of_backend())
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {PAD if byte == NEVER_TEXT else name: byte for byte, name in bytes_to_unicode().items()}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return backend
    assert isinstance(tokenizer, IdTokenizer)
    backend = Tokenizer(models.WordLevel(vocab={str(i): i for i in range(tokenizer.eos_id)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _with_pad(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer with pads in the place of the byte that no text has."""
    saved = json.loads(backend.to_str())
    model, name = saved["model"], bytes_to_unicode()[NEVER_TEXT]
    if name in model["vocab"] and not any(name in merge for merge in model["merges"]):
        model["vocab"] = {PAD if token == name else token: i for token, i in model["vocab"].items()}
    return Tokenizer.from_str(json.dumps(saved))
