"""Folders that know their contents, and are pointed at."""

import contextlib
import errno
import os
import shutil
import stat

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


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@pytest.mark.parametrize("number", NO_LINKS)
def test_without_symbolic_links_a_file_names_the_folder(tmp_path, monkeypatch, number):
    def refuse(source, target, *options):
        raise OSError(number, os.strerror(number), target)

    monkeypatch.setattr(os, "symlink", refuse)
    last = tmp_path / "last"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.point_at(last, tmp_path / name)
        assert last.read_text() == name
        assert files.complete_folder(last) == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "one", "two"]
    monkeypatch.undo()
    files.point_at(last, tmp_path / "one")
    assert last.is_symlink() and files.complete_folder(last).resolve() == tmp_path / "one"


def test_a_link_that_fails_for_another_reason_keeps_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    files.point_at(tmp_path / "last", tmp_path / "one")

    def full(source, target, *options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "symlink", full)
    with pytest.raises(OSError, match="No space"):
        files.point_at(tmp_path / "last", tmp_path / "two")
    assert (tmp_path / "last").resolve() == tmp_path / "one"


@pytest.mark.parametrize("content", [b"", b"..", b"../one", b"missing", b"\xff\0", b"x" * 300, b"/tmp"])
def test_a_file_that_names_no_sibling_is_followed_nowhere(tmp_path, content):
    (tmp_path / "one").mkdir()
    (tmp_path / "last").write_bytes(content)
    assert files.complete_folder(tmp_path / "last") == tmp_path / "last"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_disk_that_flushes_no_folders_is_written_to_and_a_broken_one_is_not(tmp_path, monkeypatch, number):
    flush = os.fsync

    def no_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    failing = (
        pytest.raises(OSError, match="Input/output") if number == errno.EIO else contextlib.nullcontext()
    )
    with failing:
        files.write_atomically(tmp_path / "x", "text")
        with files.atomic_folder(tmp_path / "folder") as partial:
            (partial / "y").write_text("more")
        assert (tmp_path / "x").read_text() == "text"
        assert (tmp_path / "folder" / "y").read_text() == "more"


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


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        with files.atomic_folder(tmp_path / "a") as partial:
            (partial / "inner").mkdir()
            for name in ("plain", "secret", "inner/secret"):
                (partial / name).write_text("x")
                if "secret" in name:
                    (partial / name).chmod(0o600)  # as safetensors writes
        files.write_atomically(tmp_path / "b", "x")
    finally:
        os.umask(before)
    found = [path for path in (*(tmp_path / "a").rglob("*"), tmp_path / "b") if path.is_file()]
    assert len(found) == 4
    assert {path.stat().st_mode & 0o777 for path in found} == {0o666 & ~mask}


def numbered(folder, number):
    with files.atomic_folder(folder) as partial:
        for name in ("a", "b"):
            (partial / name).write_text(str(number))


class Writer:
    """Replaces the folder, in whole or up to between the two renames, before chosen reads of a file."""

    def __init__(self, folder):
        self.folder, self.number, self.plan = folder, 0, []
        numbered(folder, 0)

    def read(self, folder):
        values = []
        for name in ("a", "b"):
            values.append((folder / name).read_text())
            step = self.plan.pop(0) if self.plan else None
            if step == "replace":
                self.number += 1
                numbered(self.folder, self.number)
            elif step == "half":
                self.folder.rename(self.folder.with_name(".x.previous"))
            elif step == "rest":
                numbered(self.folder, self.number)
        assert values[0] == values[1], "two states in one"
        return values[0]


@pytest.mark.parametrize(
    "plan", [["replace"], ["replace", "replace", "replace"], ["half"], ["half", "rest"], [None, "replace"]]
)
def test_a_reader_beside_a_writer_sees_one_state(tmp_path, plan):
    writer = Writer(tmp_path / "x")
    writer.plan = list(plan)

    def read(folder):
        try:
            return writer.read(folder)
        except AssertionError as error:
            raise ValueError("damaged") from error

    assert files.read_complete(tmp_path / "x", read) == str(writer.number)


def test_a_reader_gives_up_in_words_and_passes_damage_on(tmp_path):
    numbered(tmp_path / "x", 0)

    def replaced(folder):
        numbered(tmp_path / "x", 1)

    with pytest.raises(ValueError, match="it was replaced 10 times while it was read"):
        files.read_complete(tmp_path / "x", replaced)
    reads = []

    def damaged(folder):
        reads.append(folder)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        files.read_complete(tmp_path / "x", damaged)
    assert len(reads) == 1
