"""Datasets of the library ``datasets``: by name, from local files, or a folder that ``save_to_disk`` wrote."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from helmholtz._checks import check, nearest
from helmholtz.data.prepare import DataConfig, PreparedData
from helmholtz.data.texts import prepare_texts

INSTALL = "pip install 'helmholtz-nn[data]'"
VALIDATION = "validation"
FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Builders of local files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """A dataset of the library ``datasets``, taken instead of the sources; its text is in column data.text_field."""

    path: str | None = None
    """Name on the hub, folder of one, format of data_files (json, csv, parquet, text, arrow), or save_to_disk's folder.
    None takes data.sources."""
    name: str | None = None
    """Configuration of the dataset, if it has several."""
    revision: str | None = None
    """Commit, tag or branch of the dataset on the hub."""
    data_files: tuple[str, ...] = ()
    """Files of the training split; wildcards are allowed."""
    validation_files: tuple[str, ...] = ()
    """Files of the split "validation"."""
    split: str = "train"
    """Name of the training split."""
    validation_split: str | None = None
    """Split that validates. None: "validation", or a part of the training split if there is no split of that name."""

    def __post_init__(self) -> None:
        if self.path is None:
            for name in ("name", "revision", "data_files", "validation_files", "validation_split"):
                value = getattr(self, name)
                check(not value, f"dataset.{name}", value, "left out without dataset.path")
            check(self.split == "train", "dataset.split", self.split, "left out without dataset.path")
        for name in ("data_files", "validation_files"):
            value = getattr(self, name)
            check(not isinstance(value, str), f"dataset.{name}", value, "a list of paths")
        if self.validation_files:
            check(bool(self.data_files), "dataset.data_files", self.data_files, "given with validation_files")
        if self.path in FORMATS:
            check(
                bool(self.data_files), "dataset.data_files", self.data_files, f"given with path={self.path!r}"
            )
        check(self.validation_split != self.split, "dataset.validation_split", self.split, "another split")


def prepare_dataset(
    config: DataConfig, dataset: DatasetConfig, *, overwrite: bool = False, console: Console | None = None
) -> PreparedData:
    """Tokenise a dataset into ``config.folder``, as ``prepare`` does with files; a row is a document.

    Rows are streamed: neither memory nor the cache of ``datasets`` holds a copy. Settings of the validation split
    (``validation_fraction``, ``split_by``, ``seed``) are refused where the dataset has one of its own.

    Raises:
        ValueError: a dataset, split or column that is not there, rows that cannot be read or are no text, and as
            ``prepare_texts``.
        ImportError: without the package ``datasets``, with the command that installs it.
    """
    splits = _open(dataset)
    train = _texts(_split(splits, "split", dataset.split), config.text_field)
    wanted = dataset.validation_split
    if wanted is None and VALIDATION in splits and dataset.split != VALIDATION:
        wanted = VALIDATION
    validation = None
    if wanted is not None:
        validation = _texts(_split(splits, "validation_split", wanted), config.text_field)
        _check_no_split_is_made(config, wanted)
    return prepare_texts(config, train, validation, overwrite=overwrite, console=console)


def _check_no_split_is_made(config: DataConfig, split: str) -> None:
    default = DataConfig()
    for name in ("validation_fraction", "split_by", "seed"):
        value = getattr(config, name)
        if value != getattr(default, name):
            raise ValueError(f"data.{name}: got {value!r}, but the dataset's split {split!r} validates")


def _open(config: DatasetConfig) -> Mapping[str, Any]:
    """The splits by name; no row is read yet."""
    check(config.path is not None, "dataset.path", config.path, "a dataset")
    library, folder = _library(), Path(str(config.path))
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = {"train": list(config.data_files), VALIDATION: list(config.validation_files)}
    if saved:
        for name in ("name", "revision", "data_files"):
            value = getattr(config, name)
            check(not value, f"dataset.{name}", value, f"left out: {folder} was written by save_to_disk")
    if config.path in FORMATS:
        _check_files(config)
    try:
        if saved:
            found = library.load_from_disk(str(folder))
        else:
            found = library.load_dataset(
                config.path,
                config.name,
                data_files={split: paths for split, paths in files.items() if paths} or None,
                revision=config.revision,
                streaming=True,
            )
    except Exception as error:  # of many libraries
        raise _unreadable(config.path, error) from error
    return found if isinstance(found, Mapping) else {str(found.split or "train"): found}


def _check_files(config: DatasetConfig) -> None:
    """Raises: ValueError for a name or wildcard that no file of this machine has."""
    for name in ("data_files", "validation_files"):
        for pattern in getattr(config, name):
            if "://" not in pattern and not glob(pattern, recursive=True):
                raise ValueError(f"dataset.{name}: no file {pattern!r}")


def _split(splits: Mapping[str, Any], argument: str, name: str) -> Any:
    if name not in splits:
        raise ValueError(
            f"dataset.{argument}: no split {name!r}{nearest(name, splits)} (splits: {', '.join(splits)})"
        )
    return splits[name]


def _texts(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[str]:
    """The column's values; what is wrong with a row is said with its number.

    A text file's first line keeps the byte-order mark in the library's builder "text", as its only one.
    """
    iterator, number = iter(rows), 0
    builder = getattr(getattr(rows, "info", None), "builder_name", None)
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}" if builder == "text" else ""
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # of many libraries
            raise _unreadable(f"row {number}", error) from error
        if row is None:
            return
        if column not in row:
            names = ", ".join(map(str, row))
            raise ValueError(
                f"data.text_field: no column {column!r}{nearest(column, row)} (columns: {names})"
            )
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise ValueError(f"dataset row {number}: column {column!r} must hold a string, got {kind}")
        yield row[column].removeprefix(mark)
        number += 1


def _unreadable(what: object, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"dataset: {what} cannot be read: {reason}")


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"a dataset needs the package datasets: {INSTALL}") from error
    return datasets
