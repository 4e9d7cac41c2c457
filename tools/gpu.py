"""Correctness, then speed on a GPU, in eight minutes at most: for the day one is there.

    make gpu                                      # all parts, within 480 seconds, into results/gpu
    python tools/gpu.py --budget 300 --parts machine kernels layers
    python tools/gpu.py --device cpu --tiny       # every part to its end on a laptop, in two minutes

Needs the package's own dependencies alone, and no network. Parts run in the order of their worth, each in a process
with a limit of its own: machine (what copies and products reach), kernels (each operator against its plain form in
float64), steps (small models train as on a CPU, without a wait), layers (forward and backward at the sizes of
docs/design/012-gpu-budget.md), models (125 M parameters, tokens per second), compiled (the same, blocks compiled).

A case is a line of ``PART.jsonl``, written when it begins and when it ends. The same command goes on where it stopped,
on the same kind of device at the same commit; a case that ended its process or met its part's limit is told and not
tried again (``--fresh`` begins anew). At the end one table is printed, with what was not reached, ``summary.json``
holds everything, and the exit code is 1 if something was wrong.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "src")]
Row = dict[str, Any]
ORDER = ("machine", "kernels", "steps", "layers", "models", "compiled")
ATTEMPTS = 20
"""Processes of a part at most: one more for each case that ends one."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--budget", type=float, default=480, help="seconds of all parts together")
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--tiny", action="store_true", help="all parts, with sizes for a CPU")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--only", metavar="PART", choices=ORDER, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        return work(options)
    options.output.mkdir(parents=True, exist_ok=True)
    if refusal := prepare(options):
        print(refusal)
        return 2
    end = time.time() + options.budget
    for part in options.parts:
        if not supervise(part, options, end):
            return 1
    return report(options)


def prepare(options: argparse.Namespace) -> str | None:
    """Note what is measured, and forget what was if that is asked for. Returns why the folder cannot be used."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    setting = {"device": options.device.partition(":")[0], "tiny": options.tiny, "commit": commit}
    file = options.output / "setting.json"
    known = json.loads(file.read_text()) if file.exists() else setting
    if known != setting and not options.fresh:
        return f"{options.output} holds what was measured with {known}, this is {setting}: another --output, or --fresh"
    for part in () if not options.fresh else options.parts if known == setting else ORDER:
        for name in (f"{part}.jsonl", f"{part}.plan.json"):
            (options.output / name).unlink(missing_ok=True)
    file.write_text(json.dumps(setting) + "\n")
    return None


def supervise(part: str, options: argparse.Namespace, end: float) -> bool:
    """Run a part in processes of its own until all its cases are done or its time is over. False if none can begin."""
    limit = min(end, time.time() + seconds_of(part))
    command = [sys.executable, str(Path(__file__)), "--only", part, "--until", str(limit)]
    command += ["--device", options.device, "--output", str(options.output)]
    command += ["--tiny"] if options.tiny else []
    print(f"{part}: {max(0, limit - time.time()):.0f} s at most", flush=True)
    log = options.output / f"{part}.log"
    for _ in range(ATTEMPTS):
        left = limit - time.time()
        if left <= 0:
            return True
        with log.open("a") as out:
            try:
                code = subprocess.run(command, timeout=left + 5, stdout=out, stderr=out).returncode
            except subprocess.TimeoutExpired:
                if limit == end:
                    try_again(options.output, part)
                return True
        if code == 0:
            return True
        if code == 3:  # neither this part nor another can begin
            print(f"{part}: {log.read_text().strip().splitlines()[-1]}", flush=True)
            return False
    return True


def try_again(output: Path, part: str) -> None:
    """Note that a case was cut by the budget of all parts, not by a limit of its own."""
    cut = [row["case"] for row in rows_of(output, part) if row["state"] == "begun"]
    with (output / f"{part}.jsonl").open("a") as file:
        file.writelines(json.dumps({"case": case, "state": "cut"}) + "\n" for case in cut[-1:])


def seconds_of(part: str) -> int:
    """The limit of a part, known without importing torch."""
    return {"machine": 45, "kernels": 180, "steps": 60, "layers": 120, "models": 120, "compiled": 240}[part]


def work(options: argparse.Namespace) -> int:
    """The cases of one part that have not begun, as long as there is time. In a process of its own."""
    import torch
    from gpu_parts import PARTS, Place

    try:
        place = Place(torch.empty(0, device=options.device).device, options.tiny)
    except (RuntimeError, AssertionError) as error:
        print(f"--device {options.device}: {str(error).strip().splitlines()[0]}")
        return 3
    known = {row["case"] for row in rows_of(options.output, options.only) if row["state"] != "cut"}
    cases = list(PARTS[options.only](place))
    plan = options.output / f"{options.only}.plan.json"
    plan.write_text(json.dumps([case for case, _ in cases]) + "\n")
    with (options.output / f"{options.only}.jsonl").open("a", buffering=1) as file:

        def note(**values: object) -> None:
            file.write(json.dumps(values) + "\n")

        for case, run in cases:
            if case in known:
                continue
            if time.time() > options.until:
                return 0
            place.clean()
            note(case=case, state="begun")
            begin = time.time()
            try:
                row = run()
            except Exception as error:  # told, and the next case goes on
                traceback.print_exc()
                row = {"ok": False, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
            note(case=case, state="done", seconds=round(time.time() - begin, 3), **row)
            if "CUDA error" in str(row.get("error")):  # every later call would fail as well
                return 4
    return 0


def rows_of(output: Path, part: str) -> list[Row]:
    """The last line of each case: one that has begun and not ended took its process with it."""
    file, found = output / f"{part}.jsonl", dict[str, Row]()
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off
            continue
        found[row["case"]] = row
    return list(found.values())


def report(options: argparse.Namespace) -> int:
    """Print the tables and write everything as JSON. Returns 1 if a case was wrong or ended its process."""
    every = {part: rows_of(options.output, part) for part in ORDER}
    rows = {part: [row for row in found if row["state"] != "cut"] for part, found in every.items()}
    from gpu_table import roofline, table

    rows["layers"] = [roofline(row, rows["machine"]) for row in rows["layers"]]
    print("\n" + table(rows))
    for part in options.parts:
        plan = options.output / f"{part}.plan.json"
        names = json.loads(plan.read_text()) if plan.exists() else None
        missing = (
            None if names is None else [x for x in names if x not in {row["case"] for row in rows[part]}]
        )
        if missing is None or missing:
            print(f"NOT REACHED: {part}, " + ("all of it" if missing is None else ", ".join(missing)))
    (options.output / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [
        row for part in rows.values() for row in part if row["state"] == "begun" or row.get("ok") is False
    ]
    return 1 if wrong or not any(rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
