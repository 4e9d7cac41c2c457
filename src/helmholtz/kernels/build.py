"""Compiles ``csrc/`` into a library for this torch and this kind of processor, and loads it."""

import contextlib
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
OPTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
"""Of the compiler, by torch's name of what the processor can do."""
LAST_LINES = 12
"""Of a compiler's complaint, which say what is wrong."""
CACHE = "HELMHOLTZ_CACHE"
PARTS = "building-"
ABANDONED = 3600
"""Seconds after which a folder of parts belongs to a build that was killed: one takes a minute."""
TRIAL = "import sys, torch; torch.ops.load_library(sys.argv[1])"


class BuildError(OSError):
    """The compiler's last lines are in ``complaint``."""

    def __init__(self, message: str, complaint: str) -> None:
        super().__init__(f"{message}; the plain forms are used")
        self.complaint = "\n".join(complaint.splitlines()[-LAST_LINES:])


def cache_folder() -> Path:
    """Where built kernels are kept: ``HELMHOLTZ_CACHE``, or ``helmholtz`` in the user's cache.

    Raises: ValueError if the user has no home folder either.
    """
    given = os.environ.get(CACHE)
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "helmholtz"
    except RuntimeError as error:  # HOME is not set, and the system has no entry of this user
        raise ValueError(f"no folder for kernels: {error}; {CACHE} names one") from error


def library_file() -> Path:
    """The library of these sources, this torch and this kind of processor; another of any is another file.

    Raises: ValueError if there is no folder for it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(f"{torch.version.git_version} {_options()}".encode())
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    name = f"kernels-torch{torch.__version__}-{capability}-{digest.hexdigest()[:16]}.so"
    return cache_folder() / name.replace("/", "_").replace(" ", "_")


def find_library() -> Path | None:
    """The library's file if it is there, and can be seen."""
    try:
        file = library_file()
    except ValueError:
        return None
    return file if os.path.isfile(file) else None  # Path.is_file would raise for a folder of somebody else


def load() -> bool:
    """Load the library if it is built. Raises: OSError with the remedy if it is, but cannot be loaded."""
    file = find_library()
    if file is None:
        return False
    try:
        _check_length(file)
        torch.ops.load_library(str(file))
    except OSError as error:
        remedy = "remove it and run: helmholtz kernels build; HELMHOLTZ_KERNELS=plain goes without it"
        raise OSError(f"{file}: {error.__cause__ or error}; {remedy}") from error
    return True


def _check_length(file: Path) -> None:
    """An ELF library ends with its table of sections. Reading a part of one would end the process without a word."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if head.startswith(b"\x7fELF\x02\x01") and len(head) == 64:
        (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
        if file.stat().st_size < table + size * count:
            raise OSError("the file is not whole")


def compiler() -> list[str] | None:
    """The C++ compiler: ``CXX``, which may hold options, or the first of c++, g++ and clang++ that is there."""
    given = shlex.split(os.environ.get("CXX", ""))
    for name in given[:1] or ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return [found, *given[1:]]
    return None


def build() -> Path:
    """Compile, unless that was done; returns the library's file. Processes that run already go on without it.

    The file appears whole or not at all, so that two processes may build at once, and only if it can be loaded.

    Raises: ValueError without a compiler; BuildError if it fails; OSError if the cache cannot be written.
    """
    file, command = library_file(), compiler()
    _remove_abandoned(file.parent)
    if find_library():
        return file
    if command is None:
        wanted = (
            f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++ or clang++; CXX names another"
        )
        raise ValueError(f"no C++ compiler found ({wanted}): the plain forms are used")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=file.parent, prefix=PARTS)
    except OSError as error:
        raise OSError(f"{error}; {CACHE} names another folder for the kernels") from error
    with folder:
        made = Path(folder.name) / file.name
        _compile([*command, *_options()], made)
        _run("loading what was built", [sys.executable, "-c", TRIAL, str(made)])
        made.replace(file)
    return file


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(f"{PARTS}*"):
        with contextlib.suppress(OSError):  # another process removes it as well
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder)


def _compile(command: list[str], made: Path) -> None:
    """Each group of kernels by a compiler of its own, side by side, then one library of all."""

    def compiled(source: Path) -> str:
        part = str(made.with_name(f"{source.stem}.o"))
        _run(command[0], [*command, *_headers(), "-c", str(source), "-o", part])
        return part

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compiled, sorted(SOURCES.glob("*.cpp"))))
    _run(command[0], [*command, "-shared", *parts, *_libraries(), "-o", str(made)])


def _run(what: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{what} failed ({done.returncode})", done.stderr)


def _options() -> list[str]:
    return [*FLAGS, *OPTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]


def _headers() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return ["-isystem", str(root), "-isystem", str(root / "torch/csrc/api/include")]


def _libraries() -> list[str]:
    """Of the torch that is installed, with its own OpenMP: one pool of threads."""
    folder = Path(torch.__file__).parent / "lib"
    threads = [str(file) for file in sorted(folder.glob("libgomp*.so*"))[:1]]
    return [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10", *threads]
