"""The folder of a run: ``run.json``, ``metrics.jsonl``, ``summary.json``, and the checkpoints ``best`` and ``last``."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from helmholtz._files import atomic_folder, complete_folder
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.checkpoint import write_checkpoint
from helmholtz.training.state import Progress, save_training_state

BEST, LAST, RUN, SUMMARY = "best", "last", "run.json", "summary.json"
TOKENIZER = "tokenizer"

TrainingState = tuple[torch.optim.Optimizer, torch.amp.GradScaler, Progress]


def save_run(folder: Path, model: AbstractDecoder, tokenizer: Path, state: TrainingState | None) -> None:
    """Replace ``folder`` by a checkpoint that stands on its own: model, tokenizer and, if given, training state.

    Written beside its place and renamed, so that a crash leaves the old checkpoint or the new one, never half of one.
    """
    with atomic_folder(folder) as partial:
        write_checkpoint(model, partial)
        shutil.copytree(tokenizer, partial / TOKENIZER)
        if state is not None:
            save_training_state(partial, *state)


def open_run(folder: Path, description: dict[str, Any], *, resume: bool) -> bool:
    """Claim ``folder`` for the run that ``description`` (model, data, numeric settings) describes.

    Returns: whether there is a checkpoint to go on from.

    Raises: ValueError if the folder holds a run and ``resume`` is false, or holds a different run; nothing is touched.
    """
    file = folder / RUN
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".tmp")
        partial.write_text(json.dumps(description, indent=2) + "\n")
        partial.replace(file)
        return False
    if not resume:
        raise ValueError(
            f"train.output_dir: {folder} already holds a run; continue it with --train.resume=auto or name another folder"
        )
    difference = first_difference(json.loads(file.read_text()), description)
    if difference:
        raise ValueError(f"train.resume: {folder} holds a different run: {difference}")
    return complete_folder(folder / LAST).exists()


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Where two nested JSON values differ first, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            inner = f"{name}.{key}".lstrip(".")
            difference = first_difference(old.get(key), new.get(key), inner)
            if difference:
                return difference
        return ""
    return "" if old == new else f"{name} was {old!r}, now {new!r}"
