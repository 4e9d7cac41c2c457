"""From the description of a run to a trained model on disk."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from helmholtz._checks import check
from helmholtz._display import losable
from helmholtz._files import check_free_space
from helmholtz._locks import LockedFolder, lock_folder
from helmholtz._run_folder import METRICS
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokens import TokenDataset, check_contents
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.training.budget import check_memory
from helmholtz.training.callbacks import Callback, JSONLMetrics, ProgressBar, RunResult, Summary, TensorBoard
from helmholtz.training.checkpoint import can_resume, claim, first_difference, newest_checkpoint
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.distributed import on_main, process_group, training_device, world
from helmholtz.training.loop import Trainer, seed_everything
from helmholtz.training.objectives import ObjectiveFunction, ReportFunction, learned, next_token
from helmholtz.training.parts import lr_factors, objective_of, train_what_is_reached
from helmholtz.training.tracking import ExperimentTracker


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), console: Console | None = None
) -> RunResult:
    """Train the described model, or go on training it; all it makes is in ``config.train.output_dir``.

    Started by ``torchrun``, its processes share the work (``config.parallel``); the folder must be the same for all.

    Args:
        callbacks: the caller's hooks, called after the built-in ones; with several processes, in each.
        console: where progress is shown, by the main process; None shows nothing. One that cannot be written any more
            does not end the run.

    Raises:
        ValueError: the folder holds a run (and ``resume`` is "never") or another run or is in use, or data and model
            do not fit; nothing on disk is touched.
        OSError: the folder cannot be written to, or its disk is too full for the run's checkpoints.
        NonFiniteError: training diverged; checkpoints written before are untouched.
        LostRankError: another process has gone.
    """
    device = training_device(config.train.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    with (
        process_group(device.type, config.parallel.timeout_seconds),
        losable(console),
        contextlib.ExitStack() as stack,
    ):
        return _train(config, callbacks, console if world().is_main else None, stack)


def _train(
    config: RunConfig, callbacks: Sequence[Callback], console: Console | None, stack: contextlib.ExitStack
) -> RunResult:
    on_main(lambda: check_contents(config.data.folder))
    train_data, validation = open_data(config.data)
    vocabulary = train_data.vocab_size
    wanted = f"{vocabulary}, the vocabulary of {config.data.folder}"
    check(config.model.vocab_size == vocabulary, "model.vocab_size", config.model.vocab_size, wanted)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder, identity = Path(config.train.output_dir), config.identity(train_data.metadata.fingerprint)
    begun, owner = on_main(lambda: _enter(folder, identity, stack, resume=config.train.resume == "auto"))
    checkpoint = on_main(lambda: newest_checkpoint(folder, _warning(console)) if begun else None)
    trainer = _trainer(config, _model(config, checkpoint), train_data, validation)
    on_main(lambda: check_free_space(folder, _bytes_needed(config.train, trainer.model, checkpoint)))
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if config.train.utilization:
        trainer.measure_utilization()
    loggers = _loggers(config, trainer) if world().is_main else []
    on_main(lambda: claim(folder, identity, config.data.folder))
    built_in = _built_in(config.train, trainer, console) if world().is_main else []
    return trainer.fit([*built_in, *loggers, *callbacks], identity=identity, check_folder=owner.check)


def _enter(
    folder: Path, identity: dict[str, Any], stack: contextlib.ExitStack, *, resume: bool
) -> tuple[bool, LockedFolder]:
    """Own the folder from here on; whether a run is to be gone on with there."""
    can_resume(folder, identity, resume=resume)  # a folder that is refused is not touched
    owner = stack.enter_context(lock_folder(folder))
    return can_resume(folder, identity, resume=resume), owner  # another process may have begun in between


def _warning(console: Console | None) -> Callable[[str], None]:
    if console is None:
        return lambda text: warnings.warn(text, stacklevel=2)
    return lambda text: console.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False)


def _bytes_needed(config: TrainConfig, model: Decoder, checkpoint: Path | None) -> int:
    """Of the checkpoints that will be on disk at once: weights and, but for the best, two averages per weight."""
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    newest = config.keep + 1 if checkpoint is None else 1
    return weights * (3 * newest + 2)


def open_data(config: DataConfig) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation split of ``config.folder``.

    Raises: ValueError if nothing is prepared there, or if it was prepared with other settings than these.
    """
    data = TokenDataset(config.folder, "train")
    difference = first_difference(data.metadata.settings, config.settings(), "data")
    if difference:
        raise ValueError(
            f"{config.folder} was prepared with other settings ({difference}): prepare them with helmholtz data"
        )
    return data, TokenDataset(config.folder, "validation")


def _model(config: RunConfig, checkpoint: Path | None) -> Decoder:
    if checkpoint is not None:
        return _saved_model(config, checkpoint)
    check_memory(config.model)
    seed_everything(config.train.seed)
    return MODELS[config.architecture](config.model)


def _saved_model(config: RunConfig, checkpoint: Path) -> Decoder:
    """Raises: ValueError if it is another than the run's, which an old checkpoint does not say by itself."""
    model = load_checkpoint(checkpoint)
    # whether the output matrix is the embedding is for the tensors to say
    own = replace(config.model, tie_embeddings=model.config.tie_embeddings)
    difference = first_difference(model.config.to_dict(), own.to_dict(), "model")
    if type(model) is not MODELS[config.architecture] or difference:
        raise ValueError(
            f"train.resume: {checkpoint} holds another model than the run's ({difference or type(model).__name__}); "
            "move it away"
        )
    return model


def _trainer(
    config: RunConfig, model: Decoder, train_data: TokenDataset, validation: TokenDataset
) -> Trainer:
    objective: ObjectiveFunction = next_token
    report: ReportFunction = learned
    if config.objective is not None:
        added = objective_of(config.objective, seed=config.train.seed)
        train_what_is_reached(model, config.objective)
        objective, report = added, added.report
    return Trainer(
        model,
        train_data,
        validation,
        config.train,
        objective=objective,
        report=report,
        lr_factors=lr_factors(config.objective),
        parallel=config.parallel,
    )


def _built_in(config: TrainConfig, trainer: Trainer, console: Console | None) -> list[Callback]:
    start = trainer.progress.step
    path = Path(config.output_dir) / METRICS
    callbacks: list[Callback] = [
        JSONLMetrics(path, start=start, log_every=config.log_every, warn=_warning(console))
    ]
    if console is not None:
        callbacks.append(ProgressBar(console, start=start, total=config.steps))
    return [*callbacks, Summary(trainer.check_folder)]


def _loggers(run: RunConfig, trainer: Trainer) -> list[Callback]:
    """Those that need packages of their own."""
    c, folder = run.train, Path(run.train.output_dir)
    callbacks: list[Callback] = []
    if c.tensorboard:
        start = trainer.progress.step
        callbacks.append(TensorBoard(folder / "tensorboard", start=start, log_every=c.log_every))
    if c.tracker != "none":
        description = {"architecture": run.architecture, "model": run.model.to_dict(), "train": asdict(c)}
        name = folder.resolve().name
        callbacks.append(ExperimentTracker(c.tracker, c.project, name, description, c.log_every))
    return callbacks


def prepare(config: RunConfig) -> Trainer:
    """The trainer of a run that has not begun, in this process alone; nothing on disk is touched."""
    alone = replace(config.parallel, strategy="ddp", replicas=1, gather_dtype="fp32")
    return _trainer(replace(config, parallel=alone), _model(config, None), *open_data(config.data))
