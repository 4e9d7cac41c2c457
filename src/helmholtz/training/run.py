"""From the description of a run to a trained model on disk."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from helmholtz._checks import check, check_choice
from helmholtz._files import complete_folder
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz._run_folder import LAST, METRICS, SUMMARY
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokens import TokenDataset
from helmholtz.models import MODELS
from helmholtz.models.base import AbstractDecoder, ModelConfig
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.training.callbacks import Callback, JSONLMetrics, ProgressBar, RunResult, TensorBoard
from helmholtz.training.checkpoint import can_resume, claim, first_difference
from helmholtz.training.config import TrainConfig
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.loop import Trainer, seed_everything

ObjectiveConfig = FreeBitsConfig | EquilibriumObjectiveConfig


def objective_class(architecture: str) -> type[FreeBitsConfig] | type[EquilibriumObjectiveConfig] | None:
    """The settings of what a model minimises beside its cross-entropy; None if that is all."""
    if MODELS[architecture] is FreeTransformer:
        return FreeBitsConfig
    if MODELS[architecture] is MambaHopfield:
        return EquilibriumObjectiveConfig
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run: which model, on which text, trained how."""

    architecture: str
    """A key of ``MODELS``."""
    model: ModelConfig
    data: DataConfig
    """The text; ``data.folder`` must have been prepared with these settings."""
    train: TrainConfig
    objective: ObjectiveConfig | None = None
    """Of the model's ``objective_class``, and None of a model without; None elsewhere means the defaults."""

    def __post_init__(self) -> None:
        check_choice("model.architecture", self.architecture, MODELS)
        longest = self.model.max_seq_len
        wanted = f"at most model.max_seq_len = {longest}"
        check(self.train.seq_len <= longest, "train.seq_len", self.train.seq_len, wanted)
        self._check_objective()

    def _check_objective(self) -> None:
        wanted = objective_class(self.architecture)
        if wanted is None:
            absent = f"absent for {self.architecture}: only a free_transformer and a mamba_hopfield have one"
            check(self.objective is None, "objective", self.objective, absent)
            return
        if self.objective is None:
            object.__setattr__(self, "objective", wanted())
        of_this = f"a {wanted.__name__} for {self.architecture}"
        check(isinstance(self.objective, wanted), "objective", self.objective, of_this)
        for name, steps in self._scheduled().items():
            latest = f"at most train.steps = {self.train.steps}"
            check(steps <= self.train.steps, f"objective.{name}", steps, latest)

    def _scheduled(self) -> dict[str, int]:
        """The steps that the objective's schedules name."""
        c = self.objective
        if isinstance(c, FreeBitsConfig):
            return {"kappa_steps": c.kappa_steps, "kl_warmup_steps": c.kl_warmup_steps}
        assert isinstance(c, EquilibriumObjectiveConfig) and isinstance(self.model, MambaHopfieldConfig)
        steps = {"curriculum.from_step": c.curriculum[-1].from_step} if c.curriculum else {}
        if c.memory_write_step is not None:
            wanted = "absent without writable patterns (model.n_slots = 0)"
            check(self.model.n_slots > 0, "objective.memory_write_step", c.memory_write_step, wanted)
            steps["memory_write_step"] = c.memory_write_step
        return steps


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
            "peak_memory_bytes": progress.peak_memory_bytes,
            "commit": git_commit(),
            "hardware": describe_hardware(),
        }
        (result.folder / SUMMARY).write_text(json.dumps(values, indent=2) + "\n")


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), console: Console | None = None
) -> RunResult:
    """Train the described model, or go on training it; all it makes is in ``config.train.output_dir``.

    Args:
        callbacks: the caller's hooks, called after the built-in ones.
        console: where progress is shown; None shows nothing.

    Raises:
        ValueError: the folder holds a run (and ``resume`` is "never") or another run, or data and model do not
            fit; nothing on disk is touched.
        NonFiniteError: training diverged; checkpoints written before are untouched.
    """
    train_data, validation = open_data(config.data)
    vocabulary = train_data.vocab_size
    wanted = f"{vocabulary}, the vocabulary of {config.data.folder}"
    check(config.model.vocab_size == vocabulary, "model.vocab_size", config.model.vocab_size, wanted)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder, identity = Path(config.train.output_dir), _identity(config, train_data)
    resumed = can_resume(folder, identity, resume=config.train.resume == "auto")
    trainer = _trainer(config, _model(config, resumed), train_data, validation)
    if resumed:
        trainer.restore(complete_folder(folder / LAST))
    claim(folder, identity, config.data.folder)
    return trainer.fit([*_built_in(config.train, trainer, console), *callbacks])


def open_data(config: DataConfig) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation split of ``config.folder``.

    Raises: ValueError if nothing is prepared there, or if it was prepared with other settings than these.
    """
    data = TokenDataset(config.folder, "train")
    difference = first_difference(data.metadata.settings, config.settings(), "data")
    if difference:
        raise ValueError(f"{config.folder} was prepared with other settings: {difference}")
    return data, TokenDataset(config.folder, "validation")


def _identity(config: RunConfig, data: TokenDataset) -> dict[str, Any]:
    """What makes this run this run, as JSON values: a resumed run must agree with it."""
    values = {
        "architecture": config.architecture,
        "model": config.model.to_dict(),
        "data": {"fingerprint": data.metadata.fingerprint, "settings": config.data.settings()},
        "train": config.train.numerics(),
        "objective": None if config.objective is None else asdict(config.objective),
    }
    identity: dict[str, Any] = json.loads(json.dumps(values))
    return identity


def _model(config: RunConfig, resumed: bool) -> AbstractDecoder:
    if resumed:
        return load_checkpoint(Path(config.train.output_dir) / LAST)
    seed_everything(config.train.seed)
    return MODELS[config.architecture](config.model)


def _trainer(
    config: RunConfig, model: AbstractDecoder, train_data: TokenDataset, validation: TokenDataset
) -> Trainer:
    if config.objective is None:
        return Trainer(model, train_data, validation, config.train)
    objective: FreeBitsObjective | EquilibriumObjective
    if isinstance(config.objective, FreeBitsConfig):
        objective = FreeBitsObjective(config.objective, seed=config.train.seed)
        factors = {"encoder.": config.objective.encoder_lr_factor}
    else:
        objective = EquilibriumObjective(config.objective, seed=config.train.seed)
        factors = {"equilibrium.memory.": config.objective.memory_lr_factor}
    return Trainer(
        model,
        train_data,
        validation,
        config.train,
        objective=objective,
        report=objective.report,
        lr_factors=factors,
    )


def _built_in(config: TrainConfig, trainer: Trainer, console: Console | None) -> list[Callback]:
    folder, start = Path(config.output_dir), trainer.progress.step
    callbacks: list[Callback] = [JSONLMetrics(folder / METRICS, start=start, log_every=config.log_every)]
    if config.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard", start=start, log_every=config.log_every))
    if console is not None:
        callbacks.append(ProgressBar(console, start=start, total=config.steps))
    return [*callbacks, Summary(trainer)]
