"""Which text trains and which validates: a pure function of names, lengths and a seed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from helmholtz.data.corpus import Document

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Cuts a corpus in two parts that share no character of any document.

    ``document`` sends whole documents to validation, each with probability ``fraction`` by a hash of its name
    and the seed, so that adding a document moves no other. With few documents that is a lottery (of 42 works of
    Shakespeare it may pick two tragedies, or a poem of 2 kB); ``tail`` takes the last part of every document
    instead, cut at the end of a line: every author, genre and style is then in both parts in proportion.
    """

    by: Literal["document", "tail"]
    fraction: float
    seed: int

    def assign(self, document: Document) -> Iterator[tuple[Split, str]]:
        """The document's pieces with the split each belongs to; training pieces come first."""
        return self._by_tail(document) if self.by == "tail" else self._by_name(document)

    def _by_name(self, document: Document) -> Iterator[tuple[Split, str]]:
        digest = hashlib.blake2b(f"{self.seed}:{document.name}".encode(), digest_size=8).digest()
        chosen = int.from_bytes(digest, "big") < self.fraction * 2**64
        for piece in document.pieces():
            yield "validation" if chosen else "train", piece

    def _by_tail(self, document: Document) -> Iterator[tuple[Split, str]]:
        wanted = round((1 - self.fraction) * document.n_bytes)  # bytes that training still lacks
        rest = document.n_bytes
        for piece in document.pieces():
            n_bytes = len(piece.encode())
            rest -= n_bytes
            cut = _line_end(piece, wanted, is_last=rest == 0) if wanted > 0 else 0
            wanted = wanted - n_bytes if cut == len(piece) else 0
            if cut:
                yield "train", piece[:cut]
            if cut < len(piece):
                yield "validation", piece[cut:]


def _line_end(piece: str, n_bytes: int, *, is_last: bool) -> int:
    """Characters up to the end of the line that byte ``n_bytes`` is in; up to that byte in a last line, and in one
    that goes on in the next piece."""
    encoded = piece.encode()
    if len(encoded) <= n_bytes:
        return len(piece)
    end = encoded.find(b"\n", n_bytes - 1) + 1 or len(encoded)
    if end == len(encoded) and (is_last or not encoded.endswith(b"\n")):
        end = n_bytes
    return len(encoded[:end].decode(errors="ignore"))
