"""A folder has one owner, with and without ``flock``, and the owner notices when it has lost the folder."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys

import pytest

from helmholtz import _locks as locks

NO_FLOCK = [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK]


def refuse_flock(monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(params=[None, *NO_FLOCK], ids=["flock", *map(errno.errorcode.get, NO_FLOCK)])
def disk(request, monkeypatch):
    """A disk with flock, and ones that answer it with an error."""
    if request.param is not None:
        refuse_flock(monkeypatch, request.param)


def test_an_owned_folder_refuses_others_until_it_is_left(tmp_path, disk):
    (tmp_path / "content").touch()
    owner = f"in use by process {os.getpid()} on {os.uname().nodename}"
    for _ in range(2):
        with (
            locks.lock_folder(tmp_path),
            pytest.raises(ValueError, match=f"{re.escape(owner)}.*; wait for it to end or name another"),
            locks.lock_folder(tmp_path),
        ):
            pytest.fail("two owners")
    assert {path.name for path in tmp_path.iterdir()} == {"content", ".owner"}


def test_a_folder_made_for_nothing_is_removed(tmp_path, disk):
    with pytest.raises(KeyError), locks.lock_folder(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with locks.lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert (tmp_path / "used" / "file").exists()


def test_without_flock_a_killed_owner_of_this_machine_is_succeeded(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "content").touch()
    refuse_flock(monkeypatch, errno.ENOTSUP)
    with locks.lock_folder(tmp_path):
        record = (tmp_path / ".owner.lock").read_text()
    pid, host, *_ = record.splitlines()
    assert int(pid) == os.getpid()
    (tmp_path / ".owner.lock").write_text(f"{dead.pid}\n{host}\n")
    with locks.lock_folder(tmp_path):
        assert (tmp_path / ".owner.lock").read_text() == record


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_marker_of_another_machine_is_told_with_the_remedy(tmp_path, monkeypatch, has_flock):
    if not has_flock:
        refuse_flock(monkeypatch, errno.ENOLCK)
    marker = tmp_path / ".owner.lock"
    marker.write_text("17\nanother-machine\n")
    (tmp_path / ".owner").write_text("process 17 on another-machine")
    remedy = (
        f"process 17 on another-machine (its disk has no flock: if that process is gone, remove {marker})"
    )
    with pytest.raises(ValueError, match=re.escape(remedy)), locks.lock_folder(tmp_path):
        pytest.fail("two owners")
    marker.unlink()
    with locks.lock_folder(tmp_path):
        pass


def test_an_error_that_is_no_missing_flock_is_raised(tmp_path, monkeypatch):
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locks.lock_folder(tmp_path):
        pytest.fail("a disk that cannot be trusted")


def test_the_owner_notices_that_the_folder_is_gone_or_another(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with locks.lock_folder(folder) as owner:
        owner.check()
        (folder / "x").touch()
        (folder / ".owner").unlink()
        owner.check()  # the same folder
        folder.rename(moved)
        with pytest.raises(OSError, match="run was moved or removed while it was in use"):
            owner.check()
        with locks.lock_folder(folder):
            (folder / ".owner").write_text("process 1 on here")
            with pytest.raises(OSError, match="moved or removed"):
                owner.check()
            (folder / "theirs").touch()
        moved.rename(tmp_path / "x")
        shutil.rmtree(tmp_path / "x")
        with pytest.raises(OSError, match="moved or removed"):
            owner.check()
    assert {path.name for path in folder.iterdir()} == {"theirs", ".owner"}


def test_a_disk_whose_inodes_change_is_told_by_its_mark(tmp_path):
    with locks.lock_folder(tmp_path) as owner:
        locks.LockedFolder(tmp_path, (0, 0), owner.mark).check()
