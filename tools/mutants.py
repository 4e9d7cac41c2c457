"""Break one line at a time and see the tests fail.

Reads ``tools/mutants/*.toml``. Each entry changes one place of a file in a temporary copy of the package (never in the
work tree) and runs its test file against that copy; one in C++ is built first, about a minute each; those in Triton
kernels run in triton's interpreter and need it installed. A mutant that survives means a test that cannot fail; one
that is stale changes a line that is no longer there.

    python tools/mutants.py                 all of them
    python tools/mutants.py scan rope       the lists scan.toml and rope.toml
    python tools/mutants.py kernels         those in C++

An entry::

    [[mutant]]
    file = "ops/scan.py"                    # below src/helmholtz; csrc/scan.h is C++
    find = "h[t - 1]"                       # must occur exactly once
    replace = "h[t]"
    test = "tests/ops/test_scan.py"
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path(__file__).with_suffix("")
PASSED, FAILED, UNBUILT, STALE = 0, 1, -1, -2
VERDICTS = {FAILED: "killed", PASSED: "SURVIVED", UNBUILT: "UNBUILT", STALE: "STALE"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One replacement, and the tests that must notice it."""

    file: str
    find: str
    replace: str
    test: str

    def apply(self, source: Path) -> None:
        path = source / "helmholtz" / self.file
        text = path.read_text()
        path.write_text(text.replace(self.find, self.replace))

    @property
    def stale(self) -> bool:
        path = ROOT / "src" / "helmholtz" / self.file
        return not path.exists() or path.read_text().count(self.find) != 1


def read(names: Iterable[str]) -> list[Mutant]:
    """The mutants of the named lists, or of all."""
    paths = [LISTS / f"{name}.toml" for name in names] or sorted(LISTS.glob("*.toml"))
    return [Mutant(**entry) for path in paths for entry in tomllib.loads(path.read_text())["mutant"]]


def run(test: str, mutant: Mutant | None) -> int:
    """pytest's exit code for ``test`` on a copy of the package with ``mutant`` applied."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        if mutant is not None:
            mutant.apply(source)
        # without the shape checks, a mutant must be noticed by what a test asserts
        quick = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "SHAPE_CHECKS": "0"}
        env = {**os.environ, **quick, "PYTHONPATH": str(source)}
        if test.startswith("tests/triton"):
            env["TRITON_INTERPRET"] = "1"
        where = [sys.executable, "-c", "import helmholtz; print(helmholtz.__file__)"]
        found = subprocess.run(where, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        if not found.startswith(str(source)):
            raise SystemExit(f"tests would import {found.strip()} instead of the copy")
        if test.startswith("tests/triton/"):
            env["TRITON_INTERPRET"] = "1"
        if mutant is not None and mutant.file.startswith("csrc/"):
            env["HELMHOLTZ_CACHE"] = folder
            build = [sys.executable, "-c", "import helmholtz.kernels.build as b; b.build()"]
            if subprocess.run(build, env=env, cwd=ROOT, capture_output=True).returncode:
                return UNBUILT
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="*", help="names of lists; all by default")
    mutants = read(parser.parse_args().lists)
    for test in sorted({mutant.test for mutant in mutants}):
        if run(test, None) != PASSED:
            raise SystemExit(f"{test} fails without any mutant")
    survivors = 0
    for mutant in mutants:
        start = time.perf_counter()
        code = STALE if mutant.stale else run(mutant.test, mutant)
        verdict = VERDICTS.get(code, f"BROKEN (pytest exit {code})")
        survivors += code != FAILED
        print(
            f"{verdict:9} {time.perf_counter() - start:5.1f} s  {mutant.file}: {mutant.find!r} -> {mutant.replace!r}"
        )
        sys.stdout.flush()
    print(f"{len(mutants) - survivors} of {len(mutants)} killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
