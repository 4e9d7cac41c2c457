"""Text to token ids and back: raw bytes, a byte-level BPE (any UTF-8 text survives both exactly), or ids as text."""

import abc
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from helmholtz._checks import check, check_choice, check_integer
from helmholtz._files import first_damage, read_complete
from helmholtz._json import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
LARGEST_BPE = 1 << 24
"""Tokens. The trainer reserves room for as many, and ends the process if there is none."""
INSTALL = "pip install 'helmholtz-nn[data]'"
LONGEST_WORD = 256
"""Characters. The time of merging grows with the square of a word's length, and runs of spaces are words."""
WORDS = "|".join(
    [
        "'(?:[sdmt]|ll|ve|re)",
        *(rf" ?{kind}{{1,{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")),
        rf"\s{{1,{LONGEST_WORD}}}(?!\S)",
        rf"\s{{1,{LONGEST_WORD}}}",
    ]
)
"""The words of GPT-2 (Radford et al. 2019), whose lengths have no bound."""
END_OF_WORD = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)
"""Up to the last place where any text is cut: in no word of GPT-2 does white space follow something else."""


class AbstractTokenizer(abc.ABC):
    """A map from text to ids below ``eos_id``; ``eos_id``, the last id, ends a document and is never text."""

    vocab_size: int

    @property
    def eos_id(self) -> int:
        """The token after a document's last; no text encodes to it, whatever it spells."""
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without an end-of-document token.

        Raises: ValueError for half a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be Unicode, got half a surrogate pair ({error})") from error
        return self._encode(text)

    @abc.abstractmethod
    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """The text of ``pieces`` cut anew, so that the ids of the parts are those of the whole text."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of text that is Unicode."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are known to be text."""

    @abc.abstractmethod
    def byte_counts(self) -> list[int]:
        """UTF-8 bytes of text that each id stands for, by id: those of a text add up to its length.

        A token that holds a part of a character counts the bytes of that part; ``eos_id`` stands for no text and counts
        0.
        """

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what ``load_tokenizer`` reads."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, end-of-document tokens left out; bytes that are not UTF-8 become U+FFFD.

        Raises: ValueError for an id outside the vocabulary.
        """
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids must be in [0, {self.vocab_size}), the vocabulary, got {i}")
        return self._decode([i for i in ids if i != self.eos_id])


class ByteTokenizer(AbstractTokenizer):
    """The 256 bytes of UTF-8 and an end-of-document token."""

    vocab_size = BYTES + 1

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces as they are."""
        return iter(pieces)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def byte_counts(self) -> list[int]:
        return [1] * BYTES + [0]

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_kind(folder, "bytes")


class BPETokenizer(AbstractTokenizer):
    """Byte-level byte-pair encoding: frequent byte sequences are one token, all others fall apart into bytes.

    Source: Sennrich et al., "Neural machine translation of rare words with subword units", 2016; on bytes:
    Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.2.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size() + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn at most ``vocab_size - 257`` merges from ``texts``; fewer if it has no pair left to merge.

        No token is longer than ``LONGEST_WORD`` characters and a space.
        """
        check_integer("vocab_size", vocab_size, minimum=BYTES + 2)
        check(vocab_size <= LARGEST_BPE, "vocab_size", vocab_size, f"at most {LARGEST_BPE}")
        library = _library()
        before, byte_level = library.pre_tokenizers, library.pre_tokenizers.ByteLevel
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = before.Sequence(
            [
                before.Split(library.Regex(WORDS), "isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """Cut between words; the text since the last cut is held in memory."""
        return cut_between_words(pieces)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def byte_counts(self) -> list[int]:
        """An added token (of a tokenizer that was not trained here) counts the bytes of its spelling."""
        counts = [0] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token)  # its alphabet has one character per byte
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[i] = len(added.content.encode())
        return counts

    def copy_of_backend(self) -> "Tokenizer":
        """The tokenizer of the package tokenizers, without an end-of-document token; the caller may change it."""
        return _library().Tokenizer.from_str(self._tokenizer.to_str())

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_kind(folder, "bpe")
        self._tokenizer.save(str(Path(folder) / "tokenizer.json"))


class IdTokenizer(AbstractTokenizer):
    """Sequences that never were text: an id is written in decimal, ids are separated by a space.

    Args:
        n_ids: ids of the sequences; ``vocab_size`` has the end-of-document token besides.
    """

    def __init__(self, n_ids: int) -> None:
        check_integer("n_ids", n_ids)
        check(n_ids < 2**32, "n_ids", n_ids, "below 2**32")
        self.vocab_size = n_ids + 1

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """The whole text."""
        yield "".join(pieces)

    def _encode(self, text: str) -> list[int]:
        """Raises: ValueError for a word that is no id."""
        for word in text.split():
            check(word.isdecimal() and int(word) < self.eos_id, "text", word, f"ids below {self.eos_id}")
        return [int(word) for word in text.split()]

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def byte_counts(self) -> list[int]:
        """The digits of an id and the space after it."""
        return [len(str(i)) + 1 for i in range(self.eos_id)] + [0]

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_kind(folder, "ids", n_ids=self.eos_id)


def cut_between_words(pieces: Iterable[str]) -> Iterator[str]:
    """The text of ``pieces`` in parts that no word of a BPE reaches across, whatever comes before and after."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        found = END_OF_WORD.match(text)
        cut = found.end() if found else 0
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def load_tokenizer(folder: str | os.PathLike[str]) -> AbstractTokenizer:
    """The tokenizer that ``save`` wrote into ``folder``.

    Raises: ValueError if the folder holds none, or a damaged one: also if it is readable, but not what the checksums of
        the checkpoint or of the prepared text around it say.
    """
    place = Path(folder).absolute()
    return read_complete(place.parent, lambda around: _load(around, place.name))


def _load(around: Path, name: str) -> AbstractTokenizer:
    if damage := first_damage(around, below=name):
        raise ValueError(damage)
    folder = around / name
    saved = _read_kind(folder)
    kind = saved["kind"]
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "ids":
        return IdTokenizer(saved.get("n_ids"))
    return BPETokenizer(_load_bpe(folder / "tokenizer.json"))


def tokenizer_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """What ``save`` wrote into ``folder``, by name, for a copy of it; the package tokenizers is not needed.

    Raises: ValueError if the folder holds no tokenizer, or a damaged one.
    """
    place = Path(folder).absolute()
    if damage := first_damage(place.parent, below=place.name):
        raise ValueError(damage)
    if _read_kind(folder)["kind"] == "bpe" and not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{Path(folder) / 'tokenizer.json'} is missing; prepare the text again")
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def check_same_tokenizer(ours: Path, theirs: Path) -> None:
    """Raises: ValueError if two tokenizer folders differ: the ids of one would mean nothing to the other."""
    read_complete(ours.parent, lambda around: _compare(around / ours.name, theirs))


def _compare(ours: Path, theirs: Path) -> None:
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()})
    for name in names:
        one, two = ours / name, theirs / name
        if not one.exists() or not two.exists() or one.read_bytes() != two.read_bytes():
            raise _another_tokenizer(ours, theirs)


def _another_tokenizer(ours: Path, theirs: Path) -> ValueError:
    return ValueError(f"data: the tokenizer in {theirs} is not the one the model was trained with ({ours})")


def check_exported_tokenizer(exported: Path, folder: Path) -> None:
    """``check_same_tokenizer`` where ``exported`` is the ``tokenizer.json`` that ``helmholtz export`` wrote.

    Raises: ValueError if it is another than the one in ``folder``, or cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    try:
        saved = parse_json(exported.read_text())
        model, before = saved["model"], saved["pre_tokenizer"]
        # what pads has the id of a byte that no text has, or one of its own
        pads = {token["id"] for token in saved["added_tokens"]}
        vocabulary = {token: i for token, i in model["vocab"].items() if i not in pads}
        merges = model.get("merges", [])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{exported}: wanted the tokenizer of an exported model, got {error!r}") from error
    if isinstance(tokenizer, BPETokenizer):
        own = parse_json(tokenizer.copy_of_backend().to_str())
        kept = {token: i for token, i in own["model"]["vocab"].items() if i not in pads}
        same = (vocabulary, merges, before) == (kept, own["model"]["merges"], own["pre_tokenizer"])
    elif isinstance(tokenizer, ByteTokenizer):
        same = not merges and len(vocabulary) == BYTES - 1
        same = same and all(vocabulary.get(chr(byte)) == byte for byte in range(ord("!"), ord("~") + 1))
    else:
        same = vocabulary == {str(i): i for i in range(tokenizer.eos_id)}
    if not same:
        raise _another_tokenizer(exported, folder)


def _read_kind(folder: str | os.PathLike[str]) -> Any:
    """The settings of a saved tokenizer, ``kind`` among them."""
    path = Path(folder) / "kind.json"
    try:
        saved = parse_json(path.read_text())
        kind = saved["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted the kind of a saved tokenizer, got {error!r}") from error
    check_choice(f"kind in {path}", kind, ("bytes", "bpe", "ids"))
    return saved


def _load_bpe(path: Path) -> "Tokenizer":
    library = _library()
    try:
        found = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    ids = sorted(found.get_vocab().values())
    if ids != list(range(len(ids))):
        raise ValueError(f"{path}: damaged, its {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}")
    return found


def _save_kind(folder: str | os.PathLike[str], kind: str, **values: int) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "kind.json").write_text(json.dumps({"kind": kind, **values}) + "\n")


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"a BPE needs the package tokenizers: {INSTALL}") from error
    return tokenizers
