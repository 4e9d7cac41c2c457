"""What has to be saved, beside the weights, for an interrupted run to go on as if nothing had happened."""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TENSORS, VALUES = "training_state.safetensors", "training_state.json"


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps applied; a step skipped for a gradient that overflowed in fp16 is not one."""
    windows: int = 0
    """Windows of training text consumed, those of skipped steps included: the position in the data."""
    skipped: int = 0
    """fp16 steps skipped."""
    skipped_in_a_row: int = 0
    best: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    seconds: float = 0.0
    """Time spent in training steps, over all resumptions; evaluations and checkpoints not counted."""
    peak_memory_bytes: int = 0
    """Largest resident size of the processes that trained."""


def _random_values() -> dict[str, Any]:
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(inner), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_random(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, inner, gauss = values["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["random.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value.detach().contiguous()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def save_training_state(
    folder: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress
) -> None:
    """Write optimizer, gradient scaler, random number generators and progress into ``folder``; nothing pickled."""
    tensors = _optimizer_tensors(optimizer) | {"random.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
    save_file(tensors, folder / TENSORS)
    best = progress.best if math.isfinite(progress.best) else None
    values = {
        "progress": asdict(progress) | {"best": best},
        "scaler": scaler.state_dict(),
        "random": _random_values(),
    }
    (folder / VALUES).write_text(json.dumps(values))


def load_progress(folder: Path) -> Progress:
    values = json.loads((folder / VALUES).read_text())["progress"]
    return Progress(**values | {"best": math.inf if values["best"] is None else values["best"]})


def load_training_state(
    folder: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """The inverse of ``save_training_state``: everything is restored in place, the progress returned.

    Raises: ValueError if the state on disk belongs to a model of other parameters.
    """
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state.items():
        if index >= len(parameters) or entry["exp_avg"].shape != parameters[index].shape:
            raise ValueError(
                f"{folder / TENSORS}: optimizer state {index} does not fit this model's parameters"
            )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    values = json.loads((folder / VALUES).read_text())
    if scaler.is_enabled():
        scaler.load_state_dict(values["scaler"])
    _restore_random(values["random"], tensors)
    return load_progress(folder)
