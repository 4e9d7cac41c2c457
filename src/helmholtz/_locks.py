"""One process at a time in a folder: by ``flock``, or by a file that is there or not where there is no ``flock``."""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import SoftFileLock, Timeout

OWNER = ".owner"
PATIENCE = 0.3
"""Seconds to look again at a marker, of which one that a killed process of this machine left is removed."""
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
"""Lustre without its mount option, NFS without its daemon, some FUSE file systems."""

_PROCESS = uuid.uuid4()
"""Numbers of processes are used again, in containers after every start."""


class LockedError(Exception):
    """Another process holds the lock; the message says which one."""


@contextlib.contextmanager
def locked(file: Path) -> Iterator[str]:
    """Keep every other process that asks for ``file`` out until the block ends; gives what the file then says.

    ``flock`` ends with the process, however it ends. Where the file system has none, the marker ``.<file>.lock`` is
    created exclusively: a killed process leaves it, the next one on the same machine removes it, and on another
    machine the error says that it is to be removed. A marker counts on machines with ``flock`` as well, because
    machines may mount one disk differently.

    Raises: LockedError
    """
    with file.open("a+") as opened, contextlib.ExitStack() as stack:
        marker = file.with_name(f".{file.name.lstrip('.')}.lock")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_flock = True
        except BlockingIOError:
            raise LockedError(_owner(opened)) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            has_flock = False
        if not has_flock or marker.exists():
            _enter_marker(marker, opened, stack)
        mark = f"process {os.getpid()} on {os.uname().nodename}\n{_PROCESS}\n"
        opened.truncate(0)
        opened.write(mark)
        opened.flush()
        yield mark


def _enter_marker(marker: Path, opened: IO[str], stack: contextlib.ExitStack) -> None:
    try:
        stack.enter_context(SoftFileLock(marker).acquire(timeout=PATIENCE, poll_interval=0.1))
    except Timeout:
        advice = f"its disk has no flock: if that process is gone, remove {marker}"
        raise LockedError(f"{_owner(opened)} ({advice})") from None


def _owner(opened: IO[str]) -> str:
    opened.seek(0)
    return opened.readline().strip() or "another process"


@dataclass(frozen=True, slots=True)
class LockedFolder:
    """A folder that this process has to itself."""

    folder: Path
    place: tuple[int, int]
    """Device and inode."""
    mark: str
    """What its ``OWNER`` says."""

    def check(self) -> None:
        """Raises: OSError if another folder, or nothing, is now where the folder was."""
        try:
            found = os.stat(self.folder)
            # some network disks give a folder another inode every time it is asked for
            same = (found.st_dev, found.st_ino) == self.place or (
                self.folder / OWNER
            ).read_text() == self.mark
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise OSError(
                f"{self.folder} was moved or removed while it was in use; what was saved is where it was moved to: "
                "move it back, or name its new place, and go on with --train.resume=auto"
            )


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[LockedFolder]:
    """Keep every other process that asks out of ``folder`` until the block ends or this process does.

    A folder that was made for it and stayed empty is removed.

    Raises: ValueError naming the owner if there is one; OSError if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        try:
            mark = stack.enter_context(locked(folder / OWNER))
        except LockedError as error:
            raise ValueError(
                f"{folder} is in use by {error}; wait for it to end or name another folder"
            ) from None
        opened = os.open(folder, os.O_RDONLY)  # while it is open, no other folder gets its inode
        stack.callback(os.close, opened)
        found = os.fstat(opened)
        owner = LockedFolder(folder, (found.st_dev, found.st_ino), mark)
        stack.callback(_leave, owner)
        yield owner


def _leave(owner: LockedFolder) -> None:
    with contextlib.suppress(OSError):
        owner.check()
        if set(os.listdir(owner.folder)) <= {OWNER, f"{OWNER}.lock"}:
            (owner.folder / OWNER).unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a link to a folder, or one that is mounted, is not ours to remove
        folder.rmdir()
