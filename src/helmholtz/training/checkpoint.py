"""The folder of a run: ``run.json``, ``metrics.jsonl``, ``summary.json``, the checkpoints ``best`` and ``last``."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from helmholtz._files import atomic_folder, complete_folder
from helmholtz._run_folder import LAST, RUN, TOKENIZER
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.checkpoint import write_checkpoint
from helmholtz.training.state import Progress, save_training_state

TrainingState = tuple[torch.optim.Optimizer, torch.amp.GradScaler, Progress]


def save_run(folder: Path, model: AbstractDecoder, tokenizer: Path, state: TrainingState | None) -> None:
    """Make ``folder`` a checkpoint that stands on its own: model, tokenizer and, if given, training state.

    A crash leaves the old checkpoint or the new one, never half of one (``atomic_folder``).
    """
    with atomic_folder(folder) as partial:
        write_checkpoint(model, partial)
        shutil.copytree(tokenizer, partial / TOKENIZER)
        if state is not None:
            save_training_state(partial, *state)


def can_resume(folder: Path, identity: dict[str, Any], *, resume: bool) -> bool:
    """Whether ``folder`` has a checkpoint to go on from, of the run that ``identity`` describes.

    Raises: ValueError if the folder holds a run and ``resume`` is false, or if it holds a different run.
    """
    file = folder / RUN
    if not file.exists():
        return False
    if not resume:
        raise ValueError(
            f"train.output_dir: {folder} already holds a run; go on with --train.resume=auto or name another folder"
        )
    difference = first_difference(json.loads(file.read_text())["identity"], identity)
    if difference:
        raise ValueError(f"train.resume: {folder} holds a different run: {difference}")
    return complete_folder(folder / LAST).exists()


def claim(folder: Path, identity: dict[str, Any], data_folder: str) -> None:
    """Write ``run.json``: from now on ``folder`` belongs to this run."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (RUN + ".tmp")
    partial.write_text(json.dumps({"identity": identity, "data_folder": data_folder}, indent=2) + "\n")
    partial.replace(folder / RUN)


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Where two nested JSON values differ first, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = first_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return ""
    return "" if old == new else f"{name} was {old!r}, now {new!r}"
