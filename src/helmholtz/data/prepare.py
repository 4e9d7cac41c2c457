"""Turns text into a folder of tokens; the folder appears when it is complete."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, TaskID

from helmholtz._checks import check, check_choice, check_fraction, check_integer
from helmholtz._files import atomic_folder, complete_folder, write_checksums
from helmholtz.data.corpus import Document, SourceFile, documents, find_files, shakespeare_files
from helmholtz.data.split import SPLITS, Split, SplitRule
from helmholtz.data.tokenizer import (
    BYTES,
    LARGEST_BPE,
    AbstractTokenizer,
    BPETokenizer,
    ByteTokenizer,
    cut_between_words,
    load_tokenizer,
)
from helmholtz.data.tokens import (
    FORMAT,
    METADATA,
    TOKENIZER,
    Metadata,
    SplitWriter,
    TokenDataset,
    check_contents,
    token_dtype,
)

WHOLE_DOCUMENTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The text of a run, its tokenizer and its split."""

    folder: str = "data/shakespeare"
    """Folder of the tokens."""
    sources: tuple[str, ...] = ()
    """Text files (.txt .text .md .rst), JSON Lines (.jsonl .ndjson) or folders of them; none: Shakespeare."""
    validation_sources: tuple[str, ...] = ()
    """Files or folders of validation text; none: a fraction of the sources is kept for it."""
    text_field: str = "text"
    """Field of a JSON line, or column of a dataset, that holds its text."""
    tokenizer: Literal["bytes", "bpe", "ids"] = "bpe"
    """Raw bytes, or a byte-level BPE trained on the training split. "ids": rows that ``write_rows`` wrote."""
    vocab_size: int | None = None
    """Largest vocabulary of the BPE, end-of-document token included; default 2048. Bytes have 257 tokens."""
    validation_fraction: float = 0.05
    """Fraction of the text that is kept for validation, in (0, 1)."""
    split_by: Literal["auto", "document", "tail"] = "auto"
    """Keep whole documents or the tail of each for validation; auto: documents if 50 or more can be expected."""
    seed: int = 0
    """Seed of the choice of validation documents."""

    def __post_init__(self) -> None:
        check(bool(self.folder), "folder", self.folder, "the path of a folder")
        for name in ("sources", "validation_sources"):
            check(not isinstance(getattr(self, name), str), name, getattr(self, name), "a list of paths")
        check_choice("tokenizer", self.tokenizer, ("bytes", "bpe", "ids"))
        check_choice("split_by", self.split_by, ("auto", "document", "tail"))
        check_fraction("validation_fraction", self.validation_fraction)
        check(self.validation_fraction > 0, "validation_fraction", self.validation_fraction, "in (0, 1)")
        check_integer("seed", self.seed, minimum=0)
        if self.validation_sources:
            check(bool(self.sources), "sources", self.sources, "given if validation_sources are")
            self._check_unused(("validation_fraction", "split_by", "seed"), "validation_sources are given")
        if self.tokenizer == "ids":
            others = [field.name for field in fields(self) if field.name not in ("folder", "tokenizer")]
            self._check_unused(others, "tokenizer='ids' takes rows as they are")
        elif self.vocab_size is None:
            object.__setattr__(self, "vocab_size", BYTES + 1 if self.tokenizer == "bytes" else 2048)
        elif self.tokenizer == "bytes":
            check(self.vocab_size == BYTES + 1, "vocab_size", self.vocab_size, "257 for tokenizer=bytes")
        else:
            check_integer("vocab_size", self.vocab_size, minimum=BYTES + 2)
            check(self.vocab_size <= LARGEST_BPE, "vocab_size", self.vocab_size, f"at most {LARGEST_BPE}")

    def _check_unused(self, names: Sequence[str], reason: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}: got {value!r}, but {reason}")

    def settings(self) -> dict[str, Any]:
        """What the tokens depend on, besides the contents of the sources: everything but where files are."""
        if self.tokenizer == "ids":
            return {"tokenizer": "ids"}
        places = ("folder", "sources", "validation_sources")
        return {name: value for name, value in asdict(self).items() if name not in places}


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A complete folder of tokens."""

    folder: Path
    metadata: Metadata
    reused: bool
    """The folder was there already, made from the same text with the same settings."""

    @property
    def train(self) -> TokenDataset:
        return TokenDataset(self.folder, "train")

    @property
    def validation(self) -> TokenDataset:
        return TokenDataset(self.folder, "validation")

    @property
    def tokenizer(self) -> AbstractTokenizer:
        return load_tokenizer(self.folder / TOKENIZER)


def prepare(config: DataConfig, *, overwrite: bool = False, console: Console | None = None) -> PreparedData:
    """Tokenise the sources into ``config.folder``, unless it holds the same text with the same settings already.

    The folder appears complete or not at all. The sources are read three times (hash, check, encode; once more
    for a BPE), a megabyte or one JSON line at a time and, for a BPE, what came since the last end of a word. A
    document's tokens are those of ``encode`` of its whole text in a split.

    Args:
        overwrite: replace a folder prepared from other text or with other settings.
        console: where a progress bar is shown; None shows nothing.

    Raises:
        ValueError: no text, text that cannot be read, or a folder that holds something else, which is then
            left as it was.
        ImportError: a missing package, with the command that installs it.
    """
    check(config.tokenizer != "ids", "tokenizer", "ids", "'bytes' or 'bpe' for text (write_rows writes ids)")
    files = _Files(
        find_files(config.sources) if config.sources else shakespeare_files(),
        find_files(config.validation_sources),
        config.text_field,
    )
    folder, fingerprint = complete_folder(config.folder), files.fingerprint()
    difference = partial(_difference, config=config, fingerprint=fingerprint)
    found = existing_tokens(folder, difference, overwrite=overwrite)
    if found is not None:
        return PreparedData(folder, found, reused=True)
    progress = Progress(console=console, disable=console is None)
    with progress, atomic_folder(config.folder) as new:
        metadata = _write(new, config, _open_corpus(config, files, progress), fingerprint)
    return PreparedData(Path(config.folder), metadata, reused=False)


def existing_tokens(
    folder: Path, difference: Callable[[Metadata], str], *, overwrite: bool
) -> Metadata | None:
    """The metadata of a folder that can be used as it is; None if there is none or it may be replaced.

    Args:
        difference: what a folder has otherwise than wanted, in words; empty if nothing.

    Raises: ValueError for a folder that holds no tokens, or, unless it may be replaced, damaged or other ones.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / METADATA).is_file():
        raise ValueError(f"folder: {str(folder)!r} holds something else than prepared text; name another")
    try:
        metadata = Metadata.load(folder)
        for split in SPLITS:
            TokenDataset(folder, split)
        check_contents(folder)
        if changed := difference(metadata):
            raise ValueError(f"folder: {str(folder)!r} {changed}")
    except ValueError as error:
        if overwrite:
            return None
        raise ValueError(f"{error}. Name another folder, or allow overwriting") from error
    return metadata


def _difference(metadata: Metadata, config: DataConfig, fingerprint: str) -> str:
    found = ["other text"] if metadata.fingerprint != fingerprint else []
    for name, value in config.settings().items():
        if metadata.settings.get(name) != value:
            found.append(f"{name} is {metadata.settings.get(name)!r} there, {value!r} is wanted")
    return f"was prepared differently: {', '.join(found)}" if found else ""


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a corpus: to be split, or, if there are any for validation, split already."""

    sources: Sequence[SourceFile]
    validation: Sequence[SourceFile]
    text_field: str

    @property
    def are_split(self) -> bool:
        return bool(self.validation)

    def documents(self) -> Iterator[tuple[Document, Split]]:
        """Every document with the split that it came for."""
        for split, files in self._by_split():
            for document in documents(files, text_field=self.text_field):
                yield document, split

    def fingerprint(self) -> str:
        """Hash of names and contents."""
        total = hashlib.blake2b(digest_size=16)
        for split, files in self._by_split():
            prefix = "" if split == "train" else f"{split}:"
            for file in files:
                with file.path.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                total.update(f"{prefix}{file.name}\0{digest}\n".encode())
        return total.hexdigest()

    def _by_split(self) -> tuple[tuple[Split, Sequence[SourceFile]], ...]:
        return ("train", self.sources), ("validation", self.validation)


@dataclass(frozen=True, slots=True)
class _Corpus:
    """The documents with the split of each of their pieces, read anew each time it is asked for."""

    files: _Files
    rule: SplitRule
    n_bytes: int
    progress: Progress

    def documents(self, task: str) -> Iterator[Iterator[tuple[Split, str]]]:
        bar = self.progress.add_task(task, total=self.n_bytes)
        for document, split in self.files.documents():
            yield self._pieces(document, split, bar)

    def _pieces(self, document: Document, split: Split, bar: TaskID) -> Iterator[tuple[Split, str]]:
        given = ((split, piece) for piece in document.pieces())
        for pair in given if self.files.are_split else self.rule.assign(document):
            yield pair
            self.progress.advance(bar, len(pair[1].encode()))

    @property
    def split_by(self) -> str:
        return "source" if self.files.are_split else self.rule.by


def _open_corpus(config: DataConfig, files: _Files, progress: Progress) -> _Corpus:
    """Reads everything once, so that bad text is found before work is done on it."""
    n_documents = n_bytes = 0
    for document, _ in files.documents():
        n_documents += 1
        n_bytes += sum(len(piece.encode()) for piece in document.pieces())
    if not n_bytes:
        raise ValueError(f"sources: no text in {', '.join(str(file.path) for file in files.sources)}")
    by = config.split_by
    if by == "auto":
        enough = n_documents * config.validation_fraction >= WHOLE_DOCUMENTS
        by = "document" if enough else "tail"
    rule = SplitRule(by, config.validation_fraction, config.seed)
    return _Corpus(files, rule, n_bytes, progress)


def _train_tokenizer(config: DataConfig, corpus: _Corpus) -> AbstractTokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    assert config.vocab_size is not None
    texts = (
        text
        for document in corpus.documents("training the tokenizer")
        for text in cut_between_words(piece for split, piece in document if split == "train")
    )
    return BPETokenizer.train(texts, config.vocab_size)


def _write(folder: Path, config: DataConfig, corpus: _Corpus, fingerprint: str) -> Metadata:
    tokenizer = _train_tokenizer(config, corpus)
    with ExitStack() as stack:
        writers: dict[Split, SplitWriter] = {
            split: stack.enter_context(SplitWriter(folder, split, vocab_size=tokenizer.vocab_size))
            for split in SPLITS
        }
        for document in corpus.documents("encoding"):
            for split, pairs in groupby(document, key=itemgetter(0)):
                for text in tokenizer.parts(piece for _, piece in pairs):
                    writers[split].write(text, tokenizer.encode(text))
            for writer in writers.values():
                writer.end_document()
    for split, writer in writers.items():
        if not writer.counts().n_documents:
            settings = f"validation_fraction ({config.validation_fraction}) or split_by ({corpus.split_by})"
            advice = "add text" if corpus.files.are_split else f"add text, or change {settings}"
            raise ValueError(f"sources: no text came to the {split} split; {advice}")
    return complete_tokens(folder, tokenizer, writers, config, corpus.split_by, fingerprint)


def complete_tokens(
    folder: Path,
    tokenizer: AbstractTokenizer,
    writers: Mapping[Split, SplitWriter],
    config: DataConfig,
    split_by: str,
    fingerprint: str,
) -> Metadata:
    """Add tokenizer, metadata and checksums to a folder that the writers have filled."""
    metadata = Metadata(
        format=FORMAT,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        split_by=split_by,
        fingerprint=fingerprint,
        settings=config.settings(),
        train=writers["train"].counts(),
        validation=writers["validation"].counts(),
    )
    tokenizer.save(folder / TOKENIZER)
    metadata.save(folder)
    write_checksums(folder)
    return metadata
