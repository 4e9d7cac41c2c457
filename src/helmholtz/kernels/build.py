"""Compiles ``csrc/`` into a library for this torch and this kind of processor, and loads it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[1] / "csrc"
OPTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
"""Of the compiler, by torch's name of what the processor can do."""
LAST_LINES = 12
"""Of a compiler's complaint, which say what is wrong."""


def cache_folder() -> Path:
    """Where built kernels are kept: ``HELMHOLTZ_CACHE``, or ``helmholtz`` in the user's cache."""
    given = os.environ.get("HELMHOLTZ_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "helmholtz"


def library_file() -> Path:
    """The library of these sources, this torch and this kind of processor; another of any is another file."""
    capability = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    name = f"kernels-torch{torch.__version__}-{capability}-{digest.hexdigest()[:16]}.so"
    return cache_folder() / name.replace("/", "_")


def load() -> bool:
    """Load the library if it is built. Raises: OSError with the remedy if it is, but cannot be loaded."""
    file = library_file()
    if not file.is_file():
        return False
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        raise OSError(f"{file}: {error}; remove it and run: helmholtz kernels build") from error
    return True


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, or the first of c++, g++ and clang++ that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def build() -> Path:
    """Compile, unless that was done; returns the library's file.

    The file appears whole or not at all, so that two processes may build at once.

    Raises: ValueError without a compiler; OSError if it fails, with the compiler's last lines, or if the cache cannot
        be written.
    """
    file = library_file()
    if file.is_file():
        return file
    found = compiler()
    if found is None:
        raise ValueError(
            "no C++ compiler found (c++, g++ or clang++; CXX names another): the plain forms are used"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="building-") as folder:
        made = Path(folder) / file.name
        done = subprocess.run(_command(found, made), capture_output=True, text=True, errors="replace")
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
            raise OSError(
                f"{found} failed ({done.returncode}); the plain forms are used. Its last lines:\n{last}"
            )
        made.replace(file)
    return file


def _command(found: str, made: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    threads = [
        str(file) for file in sorted(libraries.glob("libgomp*.so*"))[:1]
    ]  # torch's own: one pool of threads
    return [
        found, "-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
        *OPTIONS.get(torch.backends.cpu.get_cpu_capability(), []),
        *(part for folder in include_paths() for part in ("-isystem", folder)),
        str(SOURCES / "kernels.cpp"), "-o", str(made),
        f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", *threads,
    ]  # fmt: skip
