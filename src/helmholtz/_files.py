"""Folders that are on disk either wholly or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder to fill; when the block ends it becomes ``path``, replacing what was there.

    It is filled under the hidden name ``.<name>.partial`` beside ``path``, flushed to disk and renamed. If
    the block raises, ``path`` is as before. POSIX renames a folder over an empty one only, so an old one is
    first renamed to ``.<name>.previous``: at every moment a complete folder is on disk, and between the two
    renames ``complete_folder`` finds it. The next call clears what a killed process left. One writer at a
    time.
    """
    path = Path(path).absolute()
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    path.parent.mkdir(parents=True, exist_ok=True)
    _settle(path, previous)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        if path.exists():
            path.rename(previous)
        partial.rename(path)
        _flush_one(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _settle(path, previous)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def complete_folder(path: str | os.PathLike[str]) -> Path:
    """``path``, or the folder it was about to replace if a writer was killed between its two renames."""
    path = Path(path)
    previous = _beside(path.absolute(), "previous")
    return previous if not path.exists() and previous.exists() else path


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _settle(path: Path, previous: Path) -> None:
    """Undo or finish a replacement that was cut short."""
    if not previous.exists():
        return
    if path.exists():
        shutil.rmtree(previous)
    else:
        previous.rename(path)


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _flush_one(Path(root) / name)
        _flush_one(Path(root))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Make ``text`` the content of the file ``path``, which at every moment is either the old or the new one."""
    path = Path(path).absolute()
    partial = _beside(path, "partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(text)
        _flush_one(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush_one(path.parent)
