"""From the description of a run to a trained model on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from helmholtz._checks import check, check_choice
from helmholtz._files import complete_folder
from helmholtz._hardware import describe_hardware, git_commit, peak_memory_bytes
from helmholtz.data.tokens import TokenDataset
from helmholtz.models import MODELS
from helmholtz.models.base import AbstractDecoder, ModelConfig
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.callbacks import METRICS, Callback, JSONLMetrics, ProgressBar, RunResult, TensorBoard
from helmholtz.training.checkpoint import LAST, SUMMARY, open_run
from helmholtz.training.config import TrainConfig
from helmholtz.training.loop import Trainer, seed_everything


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run: which model, on which prepared text, trained how."""

    architecture: str
    """A key of ``MODELS``."""
    model: ModelConfig
    data: str
    """Folder of prepared text (``helmholtz data``)."""
    train: TrainConfig

    def __post_init__(self) -> None:
        check_choice("model.architecture", self.architecture, MODELS)
        check(
            self.train.seq_len <= self.model.max_seq_len,
            "train.seq_len",
            self.train.seq_len,
            f"at most model.max_seq_len = {self.model.max_seq_len}",
        )

    def description(self) -> dict[str, Any]:
        """What makes this run this run, as JSON values: a resumed run must agree with it."""
        model = json.loads(json.dumps(self.model.to_dict()))
        return {
            "architecture": self.architecture,
            "model": model,
            "data": str(Path(self.data).resolve()),
            "train": self.train.numerics(),
        }


class Summary(Callback):
    """``summary.json``: how the run ended, what it cost, and what it ran on."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_end(self, result: RunResult) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        values = {
            "status": result.status,
            "steps": progress.step,
            "skipped": progress.skipped,
            "tokens": result.tokens,
            "seconds": progress.seconds,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "best_validation_loss": progress.best if progress.step else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "commit": git_commit(),
            "hardware": describe_hardware(),
        }
        (result.folder / SUMMARY).write_text(json.dumps(values, indent=2) + "\n")


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), console: Console | None = None
) -> RunResult:
    """Train the described model, or go on training it; everything it makes is in ``config.train.output_dir``.

    Args:
        callbacks: the caller's hooks, called after the built-in ones.
        console: where progress is shown; None shows nothing.

    Raises:
        ValueError: the folder holds a run (and ``resume`` is "never") or another run, or data and model do not fit.
        NonFiniteError: training diverged; checkpoints written before are untouched.
    """
    train_data, validation = TokenDataset(config.data, "train"), TokenDataset(config.data, "validation")
    check(
        config.model.vocab_size == train_data.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"the {train_data.vocab_size} of the data in {config.data}",
    )
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder = Path(config.train.output_dir)
    resumed = open_run(folder, config.description(), resume=config.train.resume == "auto")
    trainer = Trainer(_model(config, resumed), train_data, validation, config.train)
    if resumed:
        trainer.restore(complete_folder(folder / LAST))
    return trainer.fit([*_built_in(config.train, trainer, console), *callbacks])


def _model(config: RunConfig, resumed: bool) -> AbstractDecoder:
    if resumed:
        return load_checkpoint(Path(config.train.output_dir) / LAST)
    seed_everything(config.train.seed)
    return MODELS[config.architecture](config.model)


def _built_in(config: TrainConfig, trainer: Trainer, console: Console | None) -> list[Callback]:
    folder, start = Path(config.output_dir), trainer.progress.step
    callbacks: list[Callback] = [JSONLMetrics(folder / METRICS, start=start, log_every=config.log_every)]
    if config.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard", start=start, log_every=config.log_every))
    if console is not None:
        callbacks.append(ProgressBar(console, start=start, total=config.steps))
    return [*callbacks, Summary(trainer)]
