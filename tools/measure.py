"""Run the benchmarks one after the other, and leave out what was measured at this commit already.

    python tools/measure.py --list                                  # what there is
    python tools/measure.py layers_speed kernels --renew            # two of them, into benchmarks/results
    PYTHONPATH=/tmp/peer python tools/measure.py --renew            # all; the peer by pip install --no-deps --target

With ``--renew`` it also writes the tables of README.md and docs/ anew (tools/tables.py). The machine should be idle.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import tables  # noqa: E402
from _timing import COMMITTED, commit  # noqa: E402

from helmholtz import kernels  # noqa: E402

BEFORE = "252ba62"
"""The last commit without native kernels."""


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark with its options; its JSON has the name of the part."""

    script: str
    rounds: int
    keep_memory: bool = False
    against: bool = False
    """Whether it is measured beside ``BEFORE``, in turn."""


PARTS = {
    "layers_speed": Part("layers/speed.py", 7, keep_memory=True, against=True),
    "kernels": Part("ops/kernels.py", 11, keep_memory=True),
    "layers_decode": Part("layers/decode.py", 9, against=True),
    "architectures": Part("models/architectures.py", 7, against=True),
    "mad": Part("models/mad.py", 5, against=True),
    "free_transformer": Part("models/planned.py", 9),
    "layers_speed_default_allocator": Part("layers/speed.py", 5, against=True),
    "layers_growth": Part("layers/growth.py", 3, keep_memory=True),
    "layers_operations": Part("layers/operations.py", 1, against=True),
    "mamba_hopfield": Part("models/equilibrium.py", 5),
    "solvers": Part("solvers/run.py", 7),
}
"""In the order of the documentation."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--list", action="store_true", help="name the parts and do nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed runs of each candidate, in place of a part's own")
    parser.add_argument("--renew", action="store_true", help="into benchmarks/results, and the tables")
    options = parser.parse_args()
    if options.list:
        return print("\n".join(PARTS))
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if (refusal := kernels.refusal()) and kernels.SWITCH not in os.environ:
        sys.exit(f"the native kernels do not run: {refusal}")
    folder = COMMITTED if options.renew else ROOT / "results" / "benchmarks"
    failed = []
    for name in options.parts or PARTS:
        output, start = folder / f"{name}.json", time.perf_counter()
        rounds = options.rounds or PARTS[name].rounds
        if _is_done(output, rounds):
            print(f"== {name}: measured at this commit", flush=True)
            continue
        print(f"== {name}", flush=True)
        if subprocess.run(_command(PARTS[name], output, options.threads, rounds), cwd=ROOT).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.renew:
        tables.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _is_done(output: Path, rounds: int) -> bool:
    if not output.exists():
        return False
    environment = json.loads(output.read_text())["environment"]
    now = commit() | {"rounds": rounds}
    return not now["uncommitted_changes"] and all(environment.get(key) == now[key] for key in now)


def _command(part: Part, output: Path, threads: int, rounds: int) -> list[str]:
    arguments = [f"--threads={threads}", f"--rounds={rounds}"]
    if part.keep_memory:
        arguments.append("--keep-memory")
    script = f"benchmarks/{part.script}"
    if part.against:
        return [sys.executable, "tools/against.py", BEFORE, script, f"--json={output}", *arguments]
    return [sys.executable, script, f"--output={output}", *arguments]


if __name__ == "__main__":
    main()
