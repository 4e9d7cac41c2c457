"""Training runs that are killed at a chosen moment, in processes of their own, and what is left of them afterwards.

A moment is an event of the run: the n-th time that it begins or ends a step, opens, renames, links or removes something
in its folder, or flushes a file. So a kill can fall before, between and within the operations that write a checkpoint.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from helmholtz._files import first_damage
from helmholtz.training.callbacks import Callback
from helmholtz.training.run import train
from tiny_runs import tiny_run

OPERATIONS = frozenset(
    {
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "shutil.rmtree",
        "shutil.copytree",
    }
)


class Notes(Callback):
    """Writes, outside of the run's folder, which checkpoints were complete, and lets steps count as events."""

    def __init__(self, file: Path, event: Callable[[], None]) -> None:
        self.file, self.event = file, event

    def on_step(self, record) -> None:
        self.event()

    def on_checkpoint(self, folder: Path, step: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{folder.name} {step}\n")
        self.event()


class Killer:
    """Counts events and sends its process a signal at the n-th; with ``at`` None it only counts."""

    def __init__(self, folder: Path, at: int | None, number: int = signal.SIGKILL) -> None:
        self.folder, self.at, self.number = str(folder), at, number
        self.count, self.armed = 0, True
        sys.addaudithook(self._audit)
        flush = os.fsync
        os.fsync = lambda descriptor: (self.event(), flush(descriptor))[1]

    def _audit(self, name: str, arguments: tuple) -> None:
        if self.armed and name in OPERATIONS and any(self.folder in str(a) for a in arguments[:2]):
            self.event()

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


def in_child(function: Callable[[], int], output: Path) -> int:
    """Run ``function`` in a forked process that prints into ``output``; its exit code, negative for a signal.

    Torch must not have used more than one thread before.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            code = function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_until(
    data, folder: Path, at: int | None, *, number: int = signal.SIGKILL, callbacks=(), **changes
) -> int:
    """A tiny run into ``folder`` that gets a signal at event ``at``; the exit code. It prints into ``<folder>.out``.

    ``<folder>.notes`` has a line per completed checkpoint, ``<folder>.count`` the number of events of a whole run.
    """

    def run() -> int:
        killer = Killer(folder, at, number)
        notes = Notes(beside(folder, "notes"), killer.event)
        console = Console(width=200, highlight=False, emoji=False)
        result = train(tiny_run(data, folder, **changes), callbacks=[notes, *callbacks], console=console)
        killer.armed = False
        beside(folder, "count").write_text(str(killer.count))
        print(f"{result.status} after step {result.step}", flush=True)
        return 0

    return in_child(run, beside(folder, "out"))


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def last_line(folder: Path) -> str:
    """The last line that the run into ``folder`` printed."""
    lines = beside(folder, "out").read_text().strip().splitlines()
    return lines[-1] if lines else ""


def count_events(data, folder: Path, **changes) -> int:
    """Events of a whole run into ``folder``."""
    assert run_until(data, folder, None, **changes) == 0, last_line(folder)
    return int(beside(folder, "count").read_text())


def losses(folder: Path) -> list[float]:
    """The loss of every step, as it was logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def completed(folder: Path) -> dict[str, int]:
    """The newest step of each kind of checkpoint that was complete."""
    notes = beside(folder, "notes")
    if not notes.exists():
        return {}
    return {name: int(step) for name, step in (line.split() for line in notes.read_text().splitlines())}


def lost(folder: Path) -> str:
    """Which completed checkpoint is no longer there and whole, in words; empty if none is missing."""
    done = completed(folder)
    if "last" in done:
        path = folder / f"step-{done['last']:08d}"
        if not path.is_dir() and not any(
            int(p.name[5:]) > done["last"] for p in folder.glob("step-????????")
        ):
            return f"{path.name} is gone"
        for newest in sorted(folder.glob("step-????????")):
            if damage := first_damage(newest):
                return damage
        if not (folder / "last").exists():
            return "last points at nothing"
    if "best" in done:
        kept = [p for p in (folder / "best", folder / ".best.previous") if p.is_dir()]
        if not kept:
            return "best is gone"
        return first_damage(kept[0])
    return ""
