"""What has to be saved, beside the weights, for an interrupted run to go on as if nothing had happened."""

import contextlib
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from helmholtz._json import parse_json
from helmholtz.training.distributed import world

OPTIMIZER, VALUES = "optimizer", "training_state.json"
"""Folder of the optimizer's tensors, a safetensors file per process; and all else, as JSON."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps applied; one skipped for a loss or gradient that is not finite is not one."""
    windows: int = 0
    """Windows of training text consumed, those of skipped steps included."""
    windows_before: int = 0
    """Of these, how many were of another text, with which the run was begun."""
    skipped: int = 0
    """Steps skipped."""
    skipped_in_a_row: int = 0
    best: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    seconds: float = 0.0
    """Time spent in training steps, over all resumptions; evaluations and checkpoints not counted."""
    peak_memory_bytes: int = 0
    """``PeakMemory`` of the processes that trained, the largest; 0 where it cannot be measured."""

    @property
    def position(self) -> int:
        """Windows of the present text consumed."""
        return self.windows - self.windows_before


def _random_values() -> dict[str, Any]:
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(inner), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
    }


def _restore_random(values: dict[str, Any]) -> None:
    version, inner, gauss = values["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(values["torch"], dtype=torch.uint8))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's averages by the names of their parameters, sharded as these are; zeros where there are none yet."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                tensors[f"{name}.{moment}"] = state.get(moment, torch.zeros_like(parameter)).detach()
    return tensors


def save_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    identity: dict[str, Any] | None = None,
) -> None:
    """Write optimizer, gradient scaler, random number generators and progress into ``folder``; nothing pickled.

    Called by all processes at once: each writes the optimizer's shards that it holds, the main one the rest.

    Args:
        identity: JSON values that describe the run.
    """
    writer = HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)
    try:
        with _without_warnings():
            save_tensors(_moments(model, optimizer), storage_writer=writer, no_dist=world().size == 1)
    except CheckpointException as error:
        raise OSError(f"{folder / OPTIMIZER}: cannot be written ({_reasons(error)})") from error
    if not world().is_main:
        return
    best = progress.best if math.isfinite(progress.best) else None
    values = {
        "progress": asdict(progress) | {"best": best},
        "updates": {
            name: int(optimizer.state[parameter]["step"])
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        },
        "scaler": scaler.state_dict(),
        "random": _random_values(),
        "identity": identity,
    }
    (folder / VALUES).write_text(json.dumps(values))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without torch's warnings that there is one process, and of what torch 2.9 itself calls to write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextlib.contextmanager
def _values(folder: Path) -> Iterator[dict[str, Any]]:
    """What ``VALUES`` holds. Raises: ValueError naming the file for whatever its reader trips over."""
    try:
        yield parse_json((folder / VALUES).read_text())
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder / VALUES}: damaged ({type(error).__name__}: {error})") from error


def load_progress(folder: Path) -> Progress:
    with _values(folder) as values:
        progress = values["progress"]
        return Progress(**progress | {"best": math.inf if progress["best"] is None else progress["best"]})


def saved_identity(folder: Path) -> Any:
    """Of the run that saved ``folder``; None if it does not say: it is damaged, or older than this field."""
    try:
        return parse_json((folder / VALUES).read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """The inverse of ``save_training_state``: everything is restored in place, the progress returned.

    The number of processes, and how parameters are sharded, may be others than when it was saved.

    Raises: ValueError if the state on disk belongs to a model of other parameters.
    """
    tensors = _moments(model, optimizer)
    _check_names(folder / OPTIMIZER, tensors)
    try:
        reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
        with _without_warnings():
            load_tensors(tensors, storage_reader=reader, no_dist=world().size == 1)
    except CheckpointException as error:
        raise ValueError(f"{folder / OPTIMIZER}: damaged or of another model ({_reasons(error)})") from error
    with _values(folder) as values:
        for name, parameter in model.named_parameters():
            if name in values["updates"]:
                step = torch.tensor(float(values["updates"][name]), device=parameter.device)
                moments = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
                optimizer.state[parameter] = {"step": step} | moments
        if scaler.is_enabled():
            scaler.load_state_dict(values["scaler"])
        _restore_random(values["random"])
    return load_progress(folder)


def _reasons(error: CheckpointException) -> str:
    return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))


def _check_names(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """The averages on disk are those of this model's parameters. Their shapes are checked where they are read."""
    found = set[str]()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as shard:
                found |= set(shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error
    for name in wanted.keys() ^ found:
        which = "is missing" if name in wanted else "is not part of this model"
        raise ValueError(f"{folder}: the optimizer's tensor {name!r} {which}")
