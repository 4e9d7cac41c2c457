"""Token files: written as a stream, read through memory maps, checked against their metadata."""

import functools
import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer
from helmholtz._files import first_damage, read_complete
from helmholtz._json import parse_json
from helmholtz.data.split import SPLITS, Split
from helmholtz.data.tokenizer import load_tokenizer

METADATA = "metadata.json"
TOKENIZER = "tokenizer"
FORMAT = 1
CHECKED_BYTES = 1 << 26
"""Tokens that are hashed when a split is opened, which takes a tenth of a second."""
WriterT = TypeVar("WriterT", bound="SplitWriter")


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Size of one split. ``n_tokens`` counts the end-of-document tokens, ``n_bytes`` the text alone."""

    n_tokens: int
    n_bytes: int
    n_documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What ``metadata.json`` holds: how to read the token files and what they were made from."""

    format: int
    vocab_size: int
    eos_id: int
    dtype: str
    """``uint16`` if the vocabulary fits, else ``uint32``; little-endian."""
    split_by: str
    fingerprint: str
    """Hash of the names and contents of the source files."""
    settings: dict[str, Any]
    """The settings the folder was prepared with."""
    train: SplitCounts
    validation: SplitCounts

    def save(self, folder: Path) -> None:
        (folder / METADATA).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Metadata":
        """Raises: ValueError if the folder is not one of prepared text, or its metadata is damaged."""
        path = Path(folder) / METADATA
        if not path.is_file():
            raise ValueError(
                f"{os.fspath(folder)!r} is no folder of prepared text ({METADATA} is missing): "
                "make it with helmholtz data"
            )
        try:
            values = parse_json(path.read_text())
            if values["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {values['format']}")
            found = cls(**values | {split: SplitCounts(**values[split]) for split in SPLITS})
            found._check()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged metadata ({error!r})") from error
        return found

    def _check(self) -> None:
        check_integer("vocab_size", self.vocab_size)
        check(
            self.eos_id == self.vocab_size - 1, "eos_id", self.eos_id, f"{self.vocab_size - 1}, the last id"
        )
        wanted = token_dtype(self.vocab_size)
        check(self.dtype == wanted, "dtype", self.dtype, wanted)
        for split in SPLITS:
            for name, value in asdict(getattr(self, split)).items():
                check_integer(f"{split}.{name}", value)


def token_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class SplitWriter:
    """Appends documents to the token file of one split; a context manager."""

    def __init__(self, folder: Path, split: Split, *, vocab_size: int) -> None:
        self._file = _tokens_path(folder, split).open("wb")
        self._starts_path = _starts_path(folder, split)
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._eos = [vocab_size - 1]
        self._starts = array("q")
        self._n_tokens = self._n_bytes = 0
        self._open = False

    def write(self, text: str, ids: Sequence[int]) -> None:
        """Append ``ids``, the tokens of ``text``, to the current document, or start one."""
        if not self._open:
            self._starts.append(self._n_tokens)
            self._open = True
        self._append(ids)
        self._n_bytes += len(text.encode())

    def end_document(self) -> None:
        """Append the end token, unless nothing of the document came to this split."""
        if self._open:
            self._append(self._eos)
            self._open = False

    def counts(self) -> SplitCounts:
        return SplitCounts(self._n_tokens, self._n_bytes, len(self._starts))

    def _append(self, ids: Sequence[int]) -> None:
        self._file.write(np.asarray(ids, dtype=self._dtype).tobytes())  # "tofile" hides what the disk says
        self._n_tokens += len(ids)

    def __enter__(self: WriterT) -> WriterT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            np.save(self._starts_path, np.asarray(self._starts, dtype="<i8"))


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of text whose documents do not see each other."""

    inputs: Int[Tensor, "1 T"]
    targets: Int[Tensor, "1 T"]
    """The next token, and -100 (ignored by ``cross_entropy``) where that is another document's first."""
    cu_seqlens: Int32[Tensor, " n1"]
    """``0 = c_0 < ... < c_n = T``: where documents, or what is in the row of them, begin and end."""


class TokenDataset:
    """One split of prepared text as a stream of tokens, each document followed by ``eos_id``.

    The tokens stay on disk; a read touches the pages it needs and checks that its ids are in the vocabulary.

    Raises: ValueError if the folder is not prepared text, or a file does not have the size its metadata says; up to
        ``CHECKED_BYTES`` of tokens also if they are not those that were written (``check_contents`` checks any number).
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        check_choice("split", split, SPLITS)
        self.split = cast(Split, split)
        read_complete(folder, self._open)

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = Metadata.load(self.folder)
        self.counts: SplitCounts = getattr(self.metadata, self.split)
        self._path = _tokens_path(self.folder, self.split)
        dtype = np.dtype(self.metadata.dtype).newbyteorder("<")
        _check_size(self._path, self.counts.n_tokens * dtype.itemsize)
        if self._path.stat().st_size <= CHECKED_BYTES:
            _check_sums(folder, (METADATA, self._path.name, _starts_path(folder, self.split).name))
        self._tokens = np.memmap(self._path, dtype=dtype, mode="r")
        self.document_starts = self._read_starts()

    def _read_starts(self) -> Int64[np.ndarray, " documents"]:
        """Positions of the documents' first tokens, increasing from 0; memory-mapped."""
        path = _starts_path(self.folder, self.split)
        try:
            starts = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy evaluates the header, of which anything may be left
            raise ValueError(f"{path}: damaged document index ({error})") from error
        is_row = starts.ndim == 1 and starts.dtype == np.int64
        check(is_row, str(path), (starts.dtype, starts.shape), "int64, a row")
        if len(starts) != self.counts.n_documents:
            raise ValueError(f"{path}: {len(starts)} documents, the metadata say {self.counts.n_documents}")
        return starts

    def __len__(self) -> int:
        return self.counts.n_tokens

    @property
    def vocab_size(self) -> int:
        return self.metadata.vocab_size

    @property
    def eos_id(self) -> int:
        return self.metadata.eos_id

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return self.counts.n_bytes

    @property
    def tokenizer_folder(self) -> Path:
        """For ``load_tokenizer``."""
        return self.folder / TOKENIZER

    @functools.cached_property
    def byte_counts(self) -> Int64[Tensor, "vocab"]:
        """Bytes of text that each id stands for, 0 for ``eos_id`` (``AbstractTokenizer.byte_counts``).

        Raises: ValueError if the tokenizer beside the tokens is missing, damaged or of another vocabulary.
        """
        tokenizer = load_tokenizer(self.tokenizer_folder)
        size = tokenizer.vocab_size
        wanted = f"{self.vocab_size}, that of the tokens in {self.folder}"
        check(size == self.vocab_size, "the tokenizer's vocab_size", size, wanted)
        return torch.tensor(tokenizer.byte_counts())

    def count_bytes(self, tokens: Int[Tensor, "..."]) -> int:
        """Bytes of text that these tokens stand for: what bits per byte of a loss on them divide by."""
        return int(self.byte_counts[tokens.cpu()].sum())

    def read(self, starts: Int[Tensor, " n"], length: int) -> Int[Tensor, "n length"]:
        """The windows of ``length`` tokens that begin at ``starts``, as int64.

        Raises: ValueError for a window that is not within the split, or a token outside the vocabulary.
        """
        check_integer("length", length)
        if length > len(self):
            raise ValueError(f"the {self.split} split has {len(self)} tokens, a window of {length} is wanted")
        positions = starts.tolist()
        for start in positions:
            if not 0 <= start <= len(self) - length:
                raise ValueError(
                    f"starts must be in [0, {len(self) - length}] (windows of {length}, {len(self)} tokens in the "
                    f"{self.split} split), got {start}"
                )
        rows = np.empty((len(positions), length), dtype=np.int64)
        for row, start in zip(rows, positions, strict=True):
            row[:] = self._tokens[start : start + length]
        self._check_ids(rows, positions)
        return torch.from_numpy(rows)

    def _check_ids(self, rows: Int64[np.ndarray, "n length"], starts: list[int]) -> None:
        if rows.size and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0].tolist()
            raise ValueError(
                f"{self._path}: token {rows[row, column]} at position {starts[row] + column} is outside the "
                f"vocabulary of {self.vocab_size}; the file is damaged, prepare the text again"
            )

    def packed_rows(self, starts: Int[Tensor, " n"], seq_len: int) -> Iterator[PackedRow]:
        """The windows at ``starts`` with the boundaries of their documents, to train documents in isolation."""
        for start in starts.tolist():
            tokens = self.read(torch.tensor([start]), seq_len + 1)
            first, last = np.searchsorted(self.document_starts, [start + 1, start + seq_len + 1])
            inner = torch.from_numpy(self.document_starts[first:last] - start)  # in 1 .. seq_len
            targets = tokens[:, 1:].clone()
            targets[:, inner - 1] = -100
            cuts = torch.cat([torch.tensor([0]), inner[inner < seq_len], torch.tensor([seq_len])])
            yield PackedRow(tokens[:, :-1], targets, cuts.int())


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """``nats / ln 2 / n_bytes``, both summed (or both averaged) over the same tokens: comparable between tokenizers.

    Args:
        n_bytes: of the very tokens that cost the nats (``TokenDataset.count_bytes``). Infinite bits if it is 0.
    """
    return nats / math.log(2) / n_bytes if n_bytes else math.inf


def check_contents(folder: str | os.PathLike[str]) -> None:
    """Read all of a folder of prepared text once and hold it to its checksums, which old folders do not have.

    Raises: ValueError naming the first file that is not what was written, or if the tokenizer is missing or damaged.
    """
    read_complete(folder, _check_sums)
    load_tokenizer(Path(folder) / TOKENIZER)


def _check_sums(folder: Path, names: tuple[str, ...] = ()) -> None:
    if damage := first_damage(folder, names):
        raise ValueError(f"{damage}; prepare the text again")


def _tokens_path(folder: Path, split: Split) -> Path:
    return folder / f"{split}.bin"


def _starts_path(folder: Path, split: Split) -> Path:
    return folder / f"{split}.documents.npy"


def _check_size(path: Path, wanted: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != wanted:
        got = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"{path} {got}, the metadata say {wanted}: it is damaged, prepare the text again")
