"""Experiment loggers and the profiler, as callbacks. Their packages are imported when they are asked for."""

import importlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from helmholtz.training.callbacks import Callback, EvalRecord, RunResult, StepRecord

Tracker = Literal["none", "wandb", "trackio"]
PROFILED_STEPS = 3
"""After one step that is not looked at and one that warms the profiler up."""


class ExperimentTracker(Callback):
    """The metrics of a run in Weights & Biases or trackio, whose interfaces agree in what is used here."""

    def __init__(
        self, tracker: Tracker, project: str, name: str, description: dict[str, Any], log_every: int
    ) -> None:
        try:
            self.module = importlib.import_module(tracker)
        except ImportError as error:
            raise ImportError(f"train.tracker={tracker} needs its package: pip install {tracker}") from error
        self.log_every = log_every
        self.module.init(project=project, name=name, config=description)

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.log_every == 0:
            names = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second")
            values = {f"train/{name}": getattr(record, name) for name in names}
            if record.utilization is not None:
                values["train/utilization"] = record.utilization
            self.module.log(values, step=record.step)

    def on_eval(self, record: EvalRecord) -> None:
        values = {
            "validation/loss": record.validation_loss,
            "validation/bits_per_byte": record.validation_bits_per_byte,
        }
        values |= {f"learned/{name}": value for name, value in record.statistics.items()}
        self.module.log(values, step=record.step)

    def on_end(self, result: RunResult) -> None:
        self.module.finish()


class Profile(Callback):
    """Where the time of some steps goes: ``profile/trace.json`` (for Perfetto) and ``profile/table.txt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "profile"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=1, warmup=1, active=PROFILED_STEPS, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self.profiler.start()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(exist_ok=True)  # never anew in the place of a run that was moved
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self.folder / "table.txt").write_text(table)

    def on_step(self, record: StepRecord) -> None:
        self.profiler.step()

    def on_end(self, result: RunResult) -> None:
        self.profiler.stop()
