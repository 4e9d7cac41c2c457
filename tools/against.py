"""Run a benchmark alternately on this tree's package and on another commit's, and print the ratios of medians.

    python tools/against.py 252ba62 benchmarks/models/architectures.py --threads 2

The script is this tree's in both cases; it has to run on both packages. What follows it goes to the script.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from _timing import print_table  # noqa: E402

TURNS = 3
"""Runs of the script on each package, in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("script", type=Path)
    parser.add_argument("--json", type=Path, help="where the ratios go; default: results/benchmarks")
    arguments, rest = parser.parse_known_args()
    found: dict[str, list[list[dict[str, Any]]]] = {"other": [], "this": []}
    with tempfile.TemporaryDirectory() as folder:
        other, output = Path(folder) / "other", Path(folder) / "rows.json"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", other, arguments.commit], cwd=ROOT, check=True
        )
        try:
            for _ in range(TURNS):
                for name, source in (("other", other / "src"), ("this", ROOT / "src")):
                    env = {**os.environ, "PYTHONPATH": str(source)}
                    command = [sys.executable, str(arguments.script), *rest, f"--output={output}"]
                    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
                    document = json.loads(output.read_text())
                    found[name].append(document["rows"])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    rows = [_compared(found, i) for i in range(len(found["this"][0]))]
    print_table(rows)
    place = arguments.json or ROOT / "results" / "benchmarks" / f"{arguments.script.stem}_against.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    result = {"against": arguments.commit, "environment": document["environment"], "rows": rows}
    place.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {place}")


def _compared(found: dict[str, list[list[dict[str, Any]]]], i: int) -> dict[str, Any]:
    """The i-th row: medians over the runs of this package, and what they are to the other's."""
    row: dict[str, Any] = {}
    for key, value in found["this"][0][i].items():
        if not isinstance(value, int | float):
            row[key] = value
            continue
        this, other = (statistics.median(run[i][key] for run in found[name]) for name in ("this", "other"))
        row[key], row[f"{key}_ratio"] = this, this / other
    return row


if __name__ == "__main__":
    main()
