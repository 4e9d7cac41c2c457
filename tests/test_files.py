"""Folders that know their contents, have one owner, and are pointed at."""

import errno
import os
import re
import shutil

import pytest

from helmholtz import _files as files


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text("a" * 1000)
    (path / "inner" / "b.bin").write_bytes(bytes(range(256)))
    files.write_checksums(path)
    return path


def test_a_folder_as_it_was_written_has_no_damage(folder):
    assert files.first_damage(folder) == ""
    (folder / "extra.txt").write_text("what is beside does no harm")
    assert files.first_damage(folder) == ""


@pytest.mark.parametrize("name", ["a.txt", "inner/b.bin"])
def test_every_bit_matters(folder, name):
    content = bytearray((folder / name).read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 1
        (folder / name).write_bytes(content)
        assert (
            files.first_damage(folder) == f"{folder / name} is damaged: it is not what was written (SHA-256)"
        )
        content[position] ^= 1


def test_missing_and_cut_files_and_damaged_checksums_are_named(folder):
    os.truncate(folder / "a.txt", 999)
    assert "a.txt is damaged" in files.first_damage(folder)
    assert files.first_damage(folder, ("inner/b.bin",)) == "", "only what was asked for"
    (folder / "a.txt").unlink()
    assert files.first_damage(folder) == f"{folder / 'a.txt'} is missing"
    for junk in ("", "[]", "{", '"x"'):
        (folder / files.CHECKSUMS).write_text(junk)
        assert files.first_damage(folder) == f"{folder / files.CHECKSUMS} is damaged"
    (folder / files.CHECKSUMS).unlink()
    assert files.first_damage(folder) == "", "a folder without checksums says nothing"


def test_a_link_moves_from_one_sibling_to_another(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.point_at(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").resolve() == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "one", "two"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "last").resolve() == moved / "two"


def test_an_owned_folder_refuses_others_until_it_is_left(tmp_path):
    (tmp_path / "content").touch()
    owner = f"in use by process {os.getpid()} on {os.uname().nodename}; wait for it to end or name another"
    for _ in range(2):
        with (
            files.owned(tmp_path),
            pytest.raises(ValueError, match=re.escape(owner)),
            files.owned(tmp_path),
        ):
            pytest.fail("two owners")


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), files.owned(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with files.owned(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert (tmp_path / "used" / "file").exists()


def test_a_full_disk_is_said_in_bytes(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10, 5, 2_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    files.check_free_space(tmp_path, 2_500_000)
    with pytest.raises(OSError, match=r"2.5 MB are free on its disk, 3.0 MB are needed"):
        files.check_free_space(tmp_path, 3_000_000)


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    target = tmp_path / "target"
    with files.atomic_folder(target) as partial:
        (partial / "x").write_text("old")
    with pytest.raises(OSError, match="No space"), files.atomic_folder(target) as partial:
        (partial / "x").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
