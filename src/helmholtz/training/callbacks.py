"""Hooks into a run, and the ones every run has: metrics on disk, TensorBoard, a progress bar."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz._json import parse_json
from helmholtz._run_folder import SUMMARY


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. ``loss`` (nats per token) is the value before the update.

    ``bits_per_byte`` is the objective's bound of the model's own cross-entropy: not of a loss that has seen the text.
    """

    step: int
    """Steps applied, this one included."""
    tokens: int
    """Training tokens consumed so far."""
    loss: float
    bits_per_byte: float
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens_per_second: float
    skipped: bool = False
    """The loss or the gradient was not finite: no update was made and ``step`` did not advance."""
    terms: dict[str, float] = field(default_factory=dict)
    utilization: float | None = None
    """Matrix products per second over what the machine can do, if it was asked for."""


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One evaluation on validation text. ``statistics`` holds what the model has learned (beta, lambda; the plan)."""

    step: int
    tokens: int
    validation_loss: float
    validation_bits_per_byte: float
    best: bool
    """Lowest validation loss so far."""
    statistics: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    """By name: ``collapsed`` if a Free Transformer's plan is not used, ``unconverged`` and ``retrieval_collapsed`` of a
    Mamba-Hopfield model."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: ``finished``, ``interrupted`` (a signal; saved, can be resumed) or ``failed``."""

    status: str
    step: int
    tokens: int
    best_validation_loss: float
    folder: Path
    skipped: int
    """Steps whose loss or gradient was not finite."""
    seconds: float
    """Spent in steps, without evaluations and checkpoints."""
    parameters: int
    peak_memory_bytes: int | None


class Callback:
    """A user's hooks; override the ones of interest. They run in the order given, after the built-in ones.

    Order within a step: ``on_step``, then ``on_eval`` if one is due, then ``on_checkpoint`` if one is due.
    ``on_end`` runs once, also after an error.
    """

    def on_step(self, record: StepRecord) -> None:
        """After each optimizer step (each one, whatever ``log_every`` says)."""

    def on_eval(self, record: EvalRecord) -> None:
        """After each evaluation."""

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """After ``folder`` (``last`` or ``best`` of the run) has been replaced."""

    def on_end(self, result: RunResult) -> None:
        """When the run has ended, however it did."""


class JSONLMetrics(Callback):
    """One JSON object per line in ``metrics.jsonl``; ``kind`` is ``step`` or ``eval``, what is not finite is null.

    A resumed run drops the records after its checkpoint, so that the file reads as if nothing had happened; if records
    before it have been lost, it says so and goes on.

    Args:
        start: step of the checkpoint that the run goes on from.
        begin: step of another run's checkpoint that it was begun from: the first record is of the step after it.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        log_every: int,
        begin: int = 0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.log_every = log_every
        lines = path.read_text(errors="replace").splitlines() if start > begin and path.exists() else []
        kept = [line for line in lines if _step(line) <= start]
        if start > begin:
            _warn_of_loss(path, lines, start, log_every, warn, begin)
        write_atomically(path, "".join(line + "\n" for line in kept))
        self.path, self.file = path, path.open("ab", buffering=0)

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        record = (json.dumps({"kind": kind} | _finite(values)) + "\n").encode()
        try:
            while record:  # a full disk takes a part first, and fails then
                record = record[self.file.write(record) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.log_every == 0 or record.skipped:
            values = asdict(record)
            if record.utilization is None:
                del values["utilization"]
            self._write("step", values)

    def on_eval(self, record: EvalRecord) -> None:
        self._write("eval", asdict(record))

    def on_end(self, result: RunResult) -> None:
        self.file.close()


def _step(line: str) -> float:
    """Of a record; infinity for a line that is none, as the last one if the process was killed while writing it."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _warn_of_loss(
    path: Path, lines: list[str], start: int, log_every: int, warn: Callable[[str], None], begin: int
) -> None:
    """Say it if records before the checkpoint are missing at the end, or unreadable in between."""
    steps = [_step(line) for line in lines]
    while steps and steps[-1] > start:  # what came after the checkpoint is done again
        steps.pop()
    damaged = [number for number, step in enumerate(steps, start=1) if math.isinf(step)]
    if damaged:
        warn(f"{path}: line {damaged[0]} is damaged and dropped ({len(damaged)} such lines)")
    logged = sorted({step for step in steps if step <= start})
    # the run may have logged more rarely before
    interval = max(log_every, logged[-1] - logged[-2] if len(logged) > 1 else 0)
    last = logged[-1] if logged else begin
    if last + interval <= start:
        until = f"ends at step {last:.0f}" if lines else "is empty or missing"
        warn(f"{path} {until}, the checkpoint is of step {start}: the records between are lost")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for infinity or NaN."""
    known = {name: _finite(value) if isinstance(value, dict) else value for name, value in values.items()}
    bad = {name for name, value in known.items() if isinstance(value, float) and not math.isfinite(value)}
    return known | dict.fromkeys(bad)


class TensorBoard(Callback):
    """The same metrics as event files. Needs the extra ``train``."""

    def __init__(self, folder: Path, *, start: int, log_every: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("train.tensorboard needs TensorBoard: install helmholtz-nn[train]") from error
        self.log_every = log_every
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.log_every == 0:
            for name in ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second"):
                self.writer.add_scalar(f"train/{name}", getattr(record, name), record.step)
            if record.utilization is not None:
                self.writer.add_scalar("train/utilization", record.utilization, record.step)

    def on_eval(self, record: EvalRecord) -> None:
        self.writer.add_scalar("validation/loss", record.validation_loss, record.step)
        self.writer.add_scalar("validation/bits_per_byte", record.validation_bits_per_byte, record.step)
        for name, value in record.statistics.items():
            self.writer.add_scalar(f"learned/{name}", value, record.step)

    def on_end(self, result: RunResult) -> None:
        self.writer.close()


class ProgressBar(Callback):
    """A live bar on a terminal; one line per evaluation elsewhere. Each warning is shown once."""

    def __init__(self, console: Console, *, start: int, total: int) -> None:
        self.console, self.total = console, total
        self.warned = set[str]()
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=total, completed=start)
        self.progress.start()

    def on_step(self, record: StepRecord) -> None:
        text = f"{record.bits_per_byte:.3f} bits/byte, {record.tokens_per_second:,.0f} tokens/s"
        if record.utilization is not None:
            text += f", {record.utilization:.0%} of matmul speed"
        self.progress.update(self.task, completed=record.step, description=text)

    def on_eval(self, record: EvalRecord) -> None:
        mark = " (best)" if record.best else ""
        self.progress.console.print(
            f"step {record.step}/{self.total}: validation {record.validation_bits_per_byte:.4f} bits/byte{mark}",
            highlight=False,
        )
        for name in record.warnings.keys() - self.warned:
            self.warned.add(name)
            text = f"warning: {name} at step {record.step}: {record.warnings[name]}"
            self.progress.console.print(text, style="bold yellow", highlight=False, markup=False)

    def on_end(self, result: RunResult) -> None:
        self.progress.stop()


class Summary(Callback):
    """``summary.json``: how the run ended, what it cost, and what it ran on.

    Args:
        check_folder: raises OSError if the folder of the run is no longer where it was.
    """

    def __init__(self, check_folder: Callable[[], None]) -> None:
        self.check_folder = check_folder

    def on_end(self, result: RunResult) -> None:
        self.check_folder()
        values = {
            "status": result.status,
            "steps": result.step,
            "skipped": result.skipped,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "parameters": result.parameters,
            "peak_memory_bytes": result.peak_memory_bytes,
            "commit": git_commit(),
            "hardware": describe_hardware(),
        }
        write_atomically(result.folder / SUMMARY, json.dumps(values, indent=2) + "\n")
