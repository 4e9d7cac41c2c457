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
from helmholtz._run_folder import METRICS, SUMMARY
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokens import TokenDataset, check_contents
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import architecture_of, is_exported, load_checkpoint, load_exported
from helmholtz.models.decoder import Decoder
from helmholtz.training.budget import check_memory
from helmholtz.training.callbacks import Callback, JSONLMetrics, ProgressBar, RunResult, Summary, TensorBoard
from helmholtz.training.checkpoint import (
    can_resume,
    claim,
    differences,
    first_difference,
    newest_checkpoint,
    newest_whole,
)
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.distributed import on_main, process_group, training_device, world
from helmholtz.training.loop import Trainer, seed_everything
from helmholtz.training.objectives import ObjectiveFunction, ReportFunction, learned, next_token
from helmholtz.training.parts import lr_factors, objective_of, train_what_is_reached
from helmholtz.training.start import Start, find_start
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
    start = on_main(lambda: _start(config, identity, train_data, begun, console))
    trainer = _trainer(config, _model(config, start), train_data, validation)
    on_main(
        lambda: check_free_space(folder, _bytes_needed(config.train, trainer.model, new=not start.is_own))
    )
    if start.how in ("resume", "continue_from"):
        assert start.checkpoint is not None
        trainer.restore(start.checkpoint)
        trainer.progress = start.progress
    if config.train.utilization:
        trainer.measure_utilization()
    loggers = _loggers(config, trainer) if world().is_main else []
    on_main(lambda: _begin(folder, start, config.data.folder))
    if console is not None and start.how != "new":
        console.print(f"the run {start.said}", highlight=False, markup=False, soft_wrap=True)
    built_in = _built_in(config.train, trainer, start, console) if world().is_main else []
    return trainer.fit([*built_in, *loggers, *callbacks], identity=start.identity, check_folder=owner.check)


def _start(
    config: RunConfig, identity: dict[str, Any], data: TokenDataset, begun: bool, console: Console | None
) -> Start:
    """How the run begins; a damaged checkpoint in its folder is set aside."""
    warn = _warning(console)
    return find_start(
        config.train,
        identity,
        data.tokenizer_folder,
        begun=begun,
        newest=lambda folder: newest_checkpoint(folder, warn),
        warn=warn,
    )


def _begin(folder: Path, start: Start, data_folder: str) -> None:
    """Note what the run is; one that goes on with more steps has not ended any more."""
    if start.changed:
        (folder / SUMMARY).unlink(missing_ok=True)
    claim(folder, start.identity, data_folder)


def planned_start(config: RunConfig) -> Start:
    """How ``train`` would begin the run. Nothing on disk is touched, and the same errors are raised."""
    data, _ = open_data(config.data)
    identity, train = config.identity(data.metadata.fingerprint), config.train
    begun = can_resume(Path(train.output_dir), identity, resume=train.resume == "auto")
    warn = _warning(None)
    return find_start(
        train,
        identity,
        data.tokenizer_folder,
        begun=begun,
        newest=lambda folder: newest_whole(folder)[0],
        warn=warn,
    )


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


def _bytes_needed(config: TrainConfig, model: Decoder, *, new: bool) -> int:
    """Of the checkpoints that will be on disk at once: weights and, but for the best, two averages per weight."""
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    newest = config.keep + 1 if new else 1
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


def _model(config: RunConfig, start: Start) -> Decoder:
    if start.checkpoint is None or start.how == "init_from":
        check_memory(config.model)
        seed_everything(config.train.seed)
    if start.checkpoint is None:
        return MODELS[config.architecture](config.model)
    return _saved_model(config, start.how, start.checkpoint)


def _saved_model(config: RunConfig, how: str, checkpoint: Path) -> Decoder:
    """Raises: ValueError if it is another than the run's, which an old checkpoint does not say by itself."""
    exported = how == "init_from" and is_exported(checkpoint)
    model = load_exported(checkpoint) if exported else load_checkpoint(checkpoint)
    own = config.model
    if how == "resume":  # whether the output matrix is the embedding is for the tensors to say
        own = replace(own, tie_embeddings=model.config.tie_embeddings)
    found = differences(model.config.to_dict(), own.to_dict(), "model")
    difference = "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in found)
    if type(model) is not MODELS[config.architecture]:
        difference = f"model.architecture was {architecture_of(model)!r}, now {config.architecture!r}"
    if difference:
        remedy = "move it away" if how == "resume" else "give the run the model that it holds"
        raise ValueError(
            f"train.{how}: {checkpoint} holds another model than the run's ({difference}); {remedy}"
        )
    return model.float() if how == "init_from" else model


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


def _built_in(config: TrainConfig, trainer: Trainer, start: Start, console: Console | None) -> list[Callback]:
    step = trainer.progress.step
    path = Path(config.output_dir) / METRICS
    metrics = JSONLMetrics(
        path, start=step, begin=start.first_step, log_every=config.log_every, warn=_warning(console)
    )
    callbacks: list[Callback] = [metrics]
    if console is not None:
        callbacks.append(ProgressBar(console, start=step, total=config.steps))
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


def prepare(config: RunConfig, start: Start | None = None) -> Trainer:
    """The trainer of a run that has not begun, in this process alone; nothing on disk is touched.

    Args:
        start: what it would begin with, without the state of its optimizer; None: new weights.
    """
    start = Start({}) if start is None else start
    alone = replace(config.parallel, strategy="ddp", replicas=1, gather_dtype="fp32")
    trainer = _trainer(replace(config, parallel=alone), _model(config, start), *open_data(config.data))
    trainer.progress = start.progress
    return trainer
