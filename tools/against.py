"""Run a benchmark on this tree's package and on another commit's, and print both with the ratios of medians.

    python tools/against.py 252ba62 benchmarks/models/architectures.py --threads 2

The script is this tree's in both cases; it has to run on both packages. What follows it goes to the script. Two
processes take turns, one timed run each, so that whatever disturbs the machine disturbs both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from _timing import print_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("script", type=Path)
    parser.add_argument("--json", type=Path, help="where the table goes; default: results/benchmarks")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", other, arguments.commit], cwd=ROOT, check=True
        )
        try:
            this, that = _in_turn([sys.executable, str(arguments.script), *rest], other, Path(folder))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    rows = [_compared(*pair) for pair in zip(this["rows"], that["rows"], strict=True)]
    print_table(rows)
    place = arguments.json or ROOT / "results" / "benchmarks" / f"{arguments.script.stem}_against.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": this["environment"] | {"against": arguments.commit}, "rows": rows}
    place.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {place}")


def _in_turn(command: list[str], other: Path, folder: Path) -> list[dict[str, Any]]:
    """What the script found on this package and on the other one."""
    to_second, to_first = os.pipe(), os.pipe()
    places = (ROOT, to_first[0], to_second[1], "first"), (other, to_second[0], to_first[1], "second")
    outputs, processes = [], []
    for tree, read, write, order in places:
        outputs.append(folder / f"{order}.json")
        env = os.environ | {"PYTHONPATH": str(tree / "src"), "BENCHMARK_TURNS": f"{read} {write} {order}"}
        processes.append(
            subprocess.Popen(
                [*command, f"--output={outputs[-1]}"],
                env=env,
                pass_fds=(read, write),
                stdout=subprocess.DEVNULL,
            )
        )
    for end in (
        *to_second,
        *to_first,
    ):  # whoever waits for a process that has ended reads the end of its pipe
        os.close(end)
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (tree, *_) in zip(processes, places, strict=True):
        if process.returncode > 0:
            sys.exit(f"the benchmark failed on {'this tree' if tree == ROOT else 'the other commit'}")
    return [json.loads(output.read_text()) for output in outputs]


def _compared(this: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A row of this package; what is measured also of the other one, and as ratio to it."""
    row: dict[str, Any] = {}
    for key, value in this.items():
        row[key] = value
        if isinstance(value, float) and value != other[key]:
            row |= {f"{key}_other": other[key], f"{key}_ratio": value / other[key]}
    return row


if __name__ == "__main__":
    main()
