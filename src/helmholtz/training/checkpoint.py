"""The folder of a run: ``run.json``, ``metrics.jsonl``, ``summary.json`` and its checkpoints.

``best`` is a folder, ``last`` a link to the newest of the folders ``step-00000100``, of which some are kept. Each is
written under another name, flushed and renamed, and carries checksums: what has its final name is complete, and what
has been damaged since is noticed.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helmholtz._files import (
    CHECKSUMS,
    begin_folder,
    finish_folder,
    first_damage,
    point_at,
    settle_folder,
    write_atomically,
    write_checksums,
)
from helmholtz._run_folder import LAST, METRICS, RUN, SUMMARY, TOKENIZER
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.checkpoint import checkpoint_weights, write_checkpoint
from helmholtz.training.distributed import on_main, world
from helmholtz.training.parallel import whole
from helmholtz.training.state import Progress, save_training_state

TrainingState = tuple[torch.optim.Optimizer, torch.amp.GradScaler, Progress]
_STEP = re.compile(r"step-(\d{8,})")
DAMAGED = ".damaged"


def step_folder(folder: Path, step: int) -> Path:
    """Where the run in ``folder`` keeps its checkpoint after ``step`` steps."""
    return folder / f"step-{step:08d}"


def save_run(folder: Path, model: AbstractDecoder, tokenizer: Path, state: TrainingState | None) -> None:
    """Make ``folder`` a checkpoint that stands on its own: model, tokenizer and, if given, training state.

    Called by all processes at once. A crash, of one or all, leaves the old checkpoint or the new one, not half of one.
    """
    partial = on_main(lambda: begin_folder(folder))
    weights = _gathered(model)

    def finish() -> None:
        write_checkpoint(model, partial, weights)
        shutil.copytree(tokenizer, partial / TOKENIZER)
        write_checksums(partial)
        finish_folder(folder)

    try:
        if state is not None:
            save_training_state(partial, model, *state)
        on_main(finish)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _gathered(model: AbstractDecoder) -> dict[str, Tensor]:
    """Whole weights in the memory of the main process, gathered one by one; nothing in the others."""
    weights = {}
    for name, tensor in checkpoint_weights(model).items():
        gathered = whole(tensor)
        if world().is_main:
            weights[name] = gathered.cpu()
    return weights


def save_last(
    folder: Path, model: AbstractDecoder, tokenizer: Path, state: TrainingState, *, keep: int
) -> Path:
    """Write the checkpoint of the run in ``folder`` after ``state``'s step and keep the ``keep`` newest ones."""
    target = step_folder(folder, state[2].step)
    save_run(target, model, tokenizer, state)

    def replace_last() -> None:
        point_at(folder / LAST, target)
        for _, old in sorted(_steps(folder))[:-keep]:
            if old != target:
                shutil.rmtree(old)

    on_main(replace_last)
    return target


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of the run in ``folder``, which ``last`` then points at; None if there is none.

    A damaged one is renamed to ``...damaged``, after a warning, and the one before it is taken.

    Raises: ValueError if there are checkpoints but all are damaged.
    """
    for left in folder.glob(".step-*.previous"):  # one that was being written once more
        settle_folder(folder / left.stem[1:])
    found = [path for _, path in sorted(_steps(folder), reverse=True)]
    for path in found:
        complete = (path / CHECKSUMS).exists()
        damage = first_damage(path) if complete else f"{path / CHECKSUMS} is missing"
        if not damage:
            point_at(folder / LAST, path)
            return path
        aside = path.with_name(path.name + DAMAGED)
        warn(f"{damage}; its checkpoint is set aside as {aside.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    if found:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"train.resume: every checkpoint of {folder} is damaged ({names}); begin another run"
        )
    return None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def can_resume(folder: Path, identity: dict[str, Any], *, resume: bool) -> bool:
    """Whether ``folder`` holds the run that ``identity`` describes, begun before.

    Raises: ValueError if the folder holds a run and ``resume`` is false, or if it holds a different run.
    """
    file = folder / RUN
    if not file.exists():
        return False
    if not resume:
        raise ValueError(
            f"train.output_dir: {folder} already holds a run; go on with --train.resume=auto or name another folder"
        )
    try:
        old = json.loads(file.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); name another train.output_dir") from error
    difference = first_difference(old, identity)
    if difference:
        raise ValueError(f"train.resume: {folder} holds a different run: {difference}")
    for name in (METRICS, SUMMARY):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, wanted a file; move it away")
    return True


def claim(folder: Path, identity: dict[str, Any], data_folder: str) -> None:
    """Write ``run.json``: from now on ``folder`` belongs to this run."""
    write_atomically(
        folder / RUN, json.dumps({"identity": identity, "data_folder": data_folder}, indent=2) + "\n"
    )


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Where two nested JSON values differ first, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = first_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return ""
    return "" if old == new else f"{name} was {old!r}, now {new!r}"
