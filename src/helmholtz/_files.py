"""Folders that are on disk either wholly or not at all, and that know their contents."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from helmholtz._json import parse_json

T = TypeVar("T")


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
    partial = begin_folder(path)
    try:
        yield partial
        finish_folder(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        settle_folder(path)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk is told by a write, which knows no name
        raise


def begin_folder(path: Path) -> Path:
    """The first half of ``atomic_folder``, for several writers: a folder that ``finish_folder`` makes ``path``."""
    path = path.absolute()
    partial = _beside(path, "partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    settle_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish_folder(path: Path) -> None:
    """The second half of ``atomic_folder``: flush what was begun and put it in its place."""
    path = path.absolute()
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    _open_to_others(partial)
    _flush(partial)
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    _flush_one(path.parent)
    if previous.exists():
        remove_folder(previous)


REMOVED = ".removed"


def remove_folder(path: Path) -> None:
    """Take ``path`` away at once, and what is in it as far as possible, the rest when the same name is next removed.

    A network disk keeps what others have open, and the folder that it lies in.
    """
    name = f".{path.name.lstrip('.')}"
    path.rename(path.with_name(f"{name}.{uuid.uuid4().hex[:8]}{REMOVED}"))
    for left in path.parent.glob(f"{name}.????????{REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give the files of a folder that was made here the mode that the umask asks for: safetensors writes 0600."""
    wanted = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != wanted:
            with contextlib.suppress(OSError):  # of a file system that has no modes
                path.chmod(wanted)


def complete_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that ``path`` is or points at, or the one that a killed writer was about to replace.

    That writer was killed between its two renames. ``path`` may be one of ``point_at``'s files.
    """
    path = _pointed_at(Path(path))
    previous = _beside(path.absolute(), "previous")
    return previous if not path.exists() and previous.exists() else path


READS = 10
"""Before a reader gives up on a folder that is replaced again and again."""


def read_complete(path: str | os.PathLike[str], read: Callable[[Path], T]) -> T:
    """What ``read`` gives of the folder at ``path``, in one state: once more if it was replaced meanwhile.

    A run that trains replaces ``best`` and ``last`` while others read them.

    Raises: what ``read`` does; ValueError if the folder is replaced faster than it can be read.
    """
    for _ in range(READS):
        before = _state(path)
        try:
            result = read(before[0])
        except (ValueError, OSError):
            if before == _state(path):
                raise
        else:
            if before == _state(path):
                return result
    raise ValueError(f"{path}: it was replaced {READS} times while it was read")


def _state(path: str | os.PathLike[str]) -> tuple[Path, int, int]:
    """The complete folder, and what tells it from the one that replaces it at the same place; zeros if it is gone."""
    folder = complete_folder(path)
    try:
        found = folder.stat()
    except OSError:
        return folder, 0, 0
    return folder, found.st_ino, found.st_mtime_ns


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def settle_folder(path: Path) -> None:
    """Undo or finish a replacement of ``path`` that was cut short; for the one who writes it."""
    path = path.absolute()
    previous = _beside(path, "previous")
    if not previous.exists():
        return
    if path.exists():
        remove_folder(previous)
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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # some network disks flush files, and have no such thing for folders
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


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """``write_atomically`` of JSON values, a line each."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def point_at(link: Path, target: Path) -> None:
    """Make ``link`` point at its sibling ``target``; at every moment it is the old one or the new one.

    It is a symbolic link, or, on a disk that has none (exFAT, some network disks), a text file that holds the name:
    what git makes of a link there. ``complete_folder`` follows both.
    """
    fresh = _beside(link.absolute(), "link")
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target.name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        fresh.write_text(target.name)
        _flush_one(fresh)
    fresh.replace(link)
    _flush_one(link.absolute().parent)


_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_LONGEST_NAME = 255


def _pointed_at(path: Path) -> Path:
    """The sibling that the text file ``path`` names; ``path`` itself if it is anything else."""
    if not path.is_file() or path.stat().st_size > _LONGEST_NAME:
        return path
    name = path.read_bytes().decode(errors="replace").strip()
    is_name = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    return path.with_name(name) if is_name and path.with_name(name).is_dir() else path


CHECKSUMS = "checksums.json"
"""SHA-256 of every other file of a folder."""


def write_checksums(folder: Path) -> None:
    """Note what is in ``folder``, subfolders included."""
    sums = {name: sha256(folder / name) for name in _contents(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def first_damage(folder: Path, names: tuple[str, ...] = (), *, below: str = "") -> str:
    """What is wrong with a folder that has checksums, in words; empty if nothing is, or it never had any.

    Args:
        names: look at these files only; none means all.
        below: look only at the files of this subfolder.
    """
    if not (folder / CHECKSUMS).exists():
        return ""
    try:
        sums = parse_json((folder / CHECKSUMS).read_text())
        wanted = {str(name): str(value) for name, value in sums.items()}
    except (ValueError, AttributeError):
        return f"{folder / CHECKSUMS} is damaged"
    inside = [name for name in wanted if name.startswith(f"{below}/" if below else "")]
    for name in names or inside:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if name in wanted and sha256(folder / name) != wanted[name]:
            return f"{folder / name} is damaged: it is not what was written (SHA-256)"
    return ""


def _contents(folder: Path) -> list[str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS)
    return [str(path.relative_to(folder)) for path in files]


def sha256(file: Path) -> str:
    """Of the content of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_free_space(folder: Path, wanted: int) -> None:
    """Raises: OSError if less than ``wanted`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            f"{folder}: {free / 1e6:,.1f} MB are free on its disk, {wanted / 1e6:,.1f} MB are needed"
        )
