"""The fault matrix: what happens to a training run under each fault, what the user sees, and that nothing is lost.

    python tests/faults/matrix.py --output docs/experiments/faults/matrix.json

Real processes: killed, stopped by signals, on a full disk (a small tmpfs, by root), with damaged checkpoints, and with
numbers that are not finite; one process, and two under torchrun. Prints a line per fault; the exit code is 1 if a
completed checkpoint was lost or a resumed run differs from the uninterrupted one in a bit of any loss.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "support"))

import torch  # noqa: E402

from distributed_cases import torchrun  # noqa: E402
from fault_cases import beside, completed, count_events, last_line, losses, lost, run_until  # noqa: E402
from helmholtz._files import write_atomically  # noqa: E402
from helmholtz._hardware import describe_hardware, git_commit  # noqa: E402
from helmholtz.models.transformer import Transformer  # noqa: E402
from helmholtz.training.callbacks import Callback  # noqa: E402
from tiny_runs import prepare_text  # noqa: E402

SETTINGS = {"steps": 12, "save_every": 3, "eval_every": 4, "threads": 1}


@dataclass
class Row:
    """A fault and what came of it."""

    fault: str
    processes: int
    seen: str
    """What the user reads last."""
    nothing_lost: bool
    resumed_equal: bool | None
    """Every loss of the resumed run has the bits of the uninterrupted one's; None where there is nothing to resume."""
    trials: int = 1


def truncate(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "one bit flipped in": flip_a_bit,
    "missing": Path.unlink,
}


class AtStep(Callback):
    """Does something once, after a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action, self.done = step, action, False

    def on_step(self, record) -> None:
        if record.step == self.step and not self.done:
            self.done = True
            self.action()


def poison_a_weight() -> None:
    """From now on no loss is finite."""
    model = next(thing for thing in gc.get_objects() if isinstance(thing, Transformer))
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight[0, 0] = math.nan


def poison_a_batch() -> None:
    """One loss is not finite, the next one is."""
    model = next(thing for thing in gc.get_objects() if isinstance(thing, Transformer))
    calls = iter([math.nan])

    def hook(module, inputs, output):
        handle.remove()
        return output * next(calls)

    handle = model.blocks[0].register_forward_hook(hook)


def fill(file: Path) -> None:
    """Take what is left of a disk."""
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(4096)) == 4096:
            pass


class Matrix:
    """Runs faults on one prepared text, each into a folder of its own."""

    def __init__(self, folder: Path, n_kills: int, n_pair_kills: int, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.n_kills, self.n_pair_kills = n_kills, n_pair_kills
        self.data = prepare_text(folder)
        self.rows: list[Row] = []
        self.n_events = count_events(self.data, folder / "whole", **SETTINGS)
        self.reference = losses(folder / "whole")

    def note(self, row: Row) -> None:
        self.rows.append(row)
        ok = "ok  " if row.nothing_lost and row.resumed_equal is not False else "FAIL"
        print(f"{ok} {row.processes} x {row.fault} ({row.trials}): {row.seen}", flush=True)

    def run(self, folder: Path, at: int | None = None, **options) -> int:
        return run_until(self.data, folder, at, **SETTINGS | options)

    def resumed(self, folder: Path) -> bool:
        return self.run(folder, resume="auto") == 0 and losses(folder) == self.reference

    def shown(self, folder: Path) -> str:
        return last_line(folder).replace(f"{self.folder}/", "").replace(folder.name, "RUN")

    def kills(self) -> None:
        safe = equal = 0
        for number in range(self.n_kills):
            folder = self.folder / f"kill-{number}"
            assert self.run(folder, self.random.randrange(1, self.n_events + 1)) == -signal.SIGKILL
            if number % 3 == 0:  # killed again while it goes on
                self.run(folder, self.random.randrange(1, 60), resume="auto")
            safe += lost(folder) == ""
            equal += self.resumed(folder)
            shutil.rmtree(folder)
        seen = f"(killed) {safe} of {self.n_kills} lost nothing, {equal} went on to equal losses"
        fault = f"kill -9 at random among {self.n_events} moments of a run, every third twice"
        self.note(Row(fault, 1, seen, safe == self.n_kills, equal == self.n_kills, self.n_kills))

    def signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            folder = self.folder / f"signal-{number}"
            code = self.run(folder, self.n_events // 2, number=number)
            kept = code == 0 and completed(folder)["last"] == len(losses(folder))
            self.note(
                Row(number.name, 1, self.shown(folder), kept and not lost(folder), self.resumed(folder))
            )

    def damages(self) -> None:
        whole = self.folder / "damage"
        assert self.run(whole, steps=12) == 0
        names = [
            str(p.relative_to(whole / "last")) for p in sorted((whole / "last").rglob("*")) if p.is_file()
        ]
        for kind, damage in DAMAGES.items():
            for name in names:
                self._damage(whole, kind, name, damage)

    def _damage(self, whole: Path, kind: str, name: str, damage: Callable[[Path], None]) -> None:
        """Of the newest checkpoint: the one before it, of step 9, has to take over."""
        folder = self.folder / f"{kind}-{Path(name).name}"
        shutil.copytree(whole, folder, symlinks=True)
        file = folder / f"step-{SETTINGS['steps']:08d}" / name
        content = file.read_bytes()
        damage(file)
        equal = self.resumed(folder)
        text = beside(folder, "out").read_text()
        aside = folder / f"step-{SETTINGS['steps']:08d}.damaged"
        told = "warning" in text and "damaged" in text and aside.is_dir()
        seen = next((line for line in text.splitlines() if line.startswith("warning")), "(silent)")
        seen = seen.replace(f"{folder}/", "")
        self.note(Row(f"{kind} {name} ({len(content):,} bytes)", 1, seen, told, equal))

    def full_disk(self) -> None:
        mount = self.folder / "small"
        mount.mkdir()
        for size, when in (("40k", "before training"), ("1m", "while training")):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
            try:
                self._full_disk(mount, when)
            finally:
                subprocess.run(["umount", mount], check=True)

    def _full_disk(self, mount: Path, when: str) -> None:
        folder = self.folder / f"disk-{when.split()[0]}"
        (mount / "run").mkdir()
        folder.symlink_to(mount / "run")
        filled = AtStep(7, lambda: fill(mount / "fill"))
        code = self.run(folder, callbacks=[filled])
        seen = self.shown(folder)
        if when == "before training":
            self.note(Row(f"full disk {when}", 1, seen, code != 0 and not list(folder.glob("step*")), None))
            return
        safe = code != 0 and lost(folder) == "" and completed(folder)["last"] == 6
        (mount / "fill").unlink()
        self.note(Row(f"full disk {when}", 1, seen, safe, self.resumed(folder)))

    def read_only(self) -> None:
        mount = self.folder / "locked"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
            folder = self.folder / "read-only"
            folder.symlink_to(mount)
            code = self.run(folder)
            self.note(
                Row("read-only folder", 1, self.shown(folder), code != 0 and not any(mount.iterdir()), None)
            )
        finally:
            subprocess.run(["umount", mount], check=True)

    def not_finite(self) -> None:
        folder = self.folder / "nan-weight"
        code = self.run(folder, callbacks=[AtStep(7, poison_a_weight)])
        seen = self.shown(folder)
        named = "blocks.0.mlp.down_proj.weight" in (folder / "non_finite.json").read_text()
        safe = code != 0 and named and lost(folder) == "" and completed(folder)["last"] == 6
        self.note(Row("a weight becomes NaN", 1, seen, safe, self.resumed(folder)))
        folder = self.folder / "nan-batch"
        code = self.run(folder, callbacks=[AtStep(7, poison_a_batch)])
        summary = json.loads((folder / "summary.json").read_text())
        safe = code == 0 and summary["skipped"] == 1 and lost(folder) == ""
        self.note(Row("one batch gives NaN", 1, f"{self.shown(folder)}, 1 skipped", safe, None))

    def two_runs(self) -> None:
        folder, second = self.folder / "shared", []

        def start_another() -> None:
            command = [sys.executable, TESTS / "faults" / "rank.py", self.data.folder, folder, "0", "0", "9"]
            command.append(json.dumps(SETTINGS))
            environment = os.environ | {"RANK": "0"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            second.append(done.stderr.strip().splitlines()[-1])
            print(second[0], flush=True)

        code = self.run(folder, callbacks=[AtStep(7, start_another)])
        text = beside(folder, "out").read_text()
        seen = next((line for line in text.splitlines() if "is in use by" in line), "(not refused)")
        seen = seen.replace(f"{folder}", "RUN")
        self.note(
            Row(
                "a second run in the folder",
                1,
                seen,
                code == 0 and "in use" in seen,
                losses(folder) == self.reference,
            )
        )

    def pair(self, folder: Path, rank: int, event: int, number: int, *options: str):
        arguments = [TESTS / "faults" / "rank.py", self.data.folder, folder, rank, event, int(number)]
        return torchrun([*arguments, json.dumps(SETTINGS)], options=options)

    def pairs(self) -> None:
        """Two processes under torchrun."""
        whole = self.folder / "pair-whole"
        done = self.pair(whole, 0, 0, 9)
        assert done.returncode == 0, done.stdout + done.stderr
        reference = losses(whole)
        seen, safe, equal = "", 0, 0
        for number in range(self.n_pair_kills):
            folder, rank = self.folder / f"pair-{number}", number % 2
            # rank 1 makes steps and its shards, rank 0 all other files as well
            event = self.random.randrange(2, self.n_events if rank == 0 else 12)
            done = self.pair(folder, rank, event, signal.SIGKILL)
            text = done.stdout + done.stderr
            told = [line for line in text.splitlines() if "lost another rank" in line]
            seen = told[0] if told else seen
            safe += done.returncode != 0 and lost(folder) == ""
            again = self.pair(folder, 0, 0, 9)
            equal += again.returncode == 0 and losses(folder) == reference
        n = self.n_pair_kills
        self.note(Row("kill -9 one rank at random moments", 2, seen[:200], safe == n, equal == n, n))
        folder = self.folder / "pair-term"
        done = self.pair(folder, 1, 6, signal.SIGTERM)
        stopped = "interrupted after step" in done.stdout
        again = self.pair(folder, 0, 0, 9)
        equal_ = again.returncode == 0 and losses(folder) == reference
        shown = next((line for line in done.stdout.splitlines() if "interrupted" in line), "(not stopped)")
        self.note(Row("SIGTERM to one rank", 2, shown, stopped and lost(folder) == "", equal_))
        folder = self.folder / "pair-restart"
        done = self.pair(folder, 1, 8, signal.SIGKILL, "--max-restarts=1")
        equal_ = done.returncode == 0 and losses(folder) == reference
        shown = next((line for line in done.stdout.splitlines() if "finished" in line), "(not restarted)")
        self.note(Row("kill -9 one rank, torchrun --max-restarts=1", 2, shown, lost(folder) == "", equal_))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="JSON file of the result")
    parser.add_argument("--kills", type=int, default=120, help="random kills of one process")
    parser.add_argument("--pair-kills", type=int, default=8, help="random kills of one of two processes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), arguments.kills, arguments.pair_kills, arguments.seed)
        before = (matrix.kills, matrix.signals, matrix.damages, matrix.full_disk, matrix.read_only)
        for fault in (*before, matrix.not_finite, matrix.two_runs, matrix.pairs):
            fault()
    failed = [row for row in matrix.rows if not row.nothing_lost or row.resumed_equal is False]
    result = {
        "command": f"python tests/faults/matrix.py --kills {arguments.kills} --pair-kills {arguments.pair_kills} "
        f"--seed {arguments.seed}",
        "commit": git_commit(),
        "hardware": describe_hardware(),
        "seconds": round(time.monotonic() - begin),
        "kill_points": arguments.kills + arguments.pair_kills,
        "rows": [asdict(row) for row in matrix.rows],
    }
    write_atomically(arguments.output, json.dumps(result, indent=1) + "\n")
    print(
        f"{len(matrix.rows) - len(failed)} of {len(matrix.rows)} faults lose nothing and are gone on from exactly"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
