"""Texts that come one by one, from wherever there is an iterator of them."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from helmholtz._checks import check
from helmholtz.data.prepare import DataConfig, PreparedData, prepare
from helmholtz.data.split import Split


def prepare_texts(
    config: DataConfig,
    train: Iterable[str],
    validation: Iterable[str] | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> PreparedData:
    """As ``prepare``, of texts each of which is a document.

    They are read once, one at a time, and kept in a hidden folder beside ``config.folder`` until the tokens are
    written: nothing of their number stays in memory, and whatever they come from need not give them twice.

    Args:
        config: without sources.
        validation: None keeps a part of ``train``, as ``config`` says.

    Raises: as ``prepare``, and ValueError for something that is no text, or if there is none.
    """
    named = (*config.sources, *config.validation_sources)
    check(not named, "sources", named, "empty if texts are handed over")
    with _folder_beside(Path(config.folder).absolute()) as folder:
        progress = Progress(console=console, disable=console is None, transient=True)
        with progress:
            sources = _write(folder, "train", train, progress)
            validation_sources = (
                () if validation is None else _write(folder, "validation", validation, progress)
            )
        config = replace(config, sources=sources, validation_sources=validation_sources, text_field="text")
        return prepare(config, overwrite=overwrite, console=console)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """An empty hidden folder that is gone afterwards; one that a killed process left is taken over."""
    folder = path.with_name(f".{path.name}.texts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _write(folder: Path, split: Split, texts: Iterable[str], progress: Progress) -> tuple[str, ...]:
    """A line of JSON per text, an empty one included, so that the number of a text is that of its line."""
    path, found = folder / f"{split}.jsonl", False
    bar = progress.add_task(f"reading {split}", total=None)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(texts):
            _check_text(f"{split} text {number}", text)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            found = found or bool(text)
            progress.advance(bar)
    if not found:
        raise ValueError(f"{split}: no text came")
    return (str(path),)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not text ({error})") from error
