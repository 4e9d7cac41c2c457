"""The folder of a run: ``run.json``, ``metrics.jsonl``, ``summary.json`` and its checkpoints.

``best`` is a folder, ``last`` a link to the newest of the folders ``step-00000100``, of which some are kept. Each is
written under another name, flushed and renamed, and carries checksums: what has its final name is complete, and what
has been damaged since is noticed. What can be resumed also carries the identity of its run.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helmholtz._files import (
    CHECKSUMS,
    REMOVED,
    begin_folder,
    finish_folder,
    first_damage,
    point_at,
    remove_folder,
    settle_folder,
    write_atomically,
    write_checksums,
)
from helmholtz._json import parse_json
from helmholtz._run_folder import BEST, LAST, METRICS, RUN, SUMMARY, TOKENIZER
from helmholtz.models.checkpoint import checkpoint_weights, write_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.training.distributed import on_main, world
from helmholtz.training.parallel import full_tensor
from helmholtz.training.state import Progress, load_progress, save_training_state, saved_identity

TrainingState = tuple[torch.optim.Optimizer, torch.amp.GradScaler, Progress, dict[str, Any] | None]
"""What resuming needs beside the weights; the last is the identity of the run, if it has one."""
_STEP = re.compile(r"step-(\d{8,})")
DAMAGED = ".damaged"
HISTORY = "history"
"""Key of an identity: what the run was begun from and how it was changed (``training.start``), if anything was."""
RESUME = "resume"
"""What an event of a history is called that raised ``train.steps`` in the folder of the run."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the run in ``folder`` keeps its checkpoint after ``step`` steps."""
    return folder / f"step-{step:08d}"


def save_run(
    folder: Path, model: Decoder, tokenizer: Mapping[str, bytes], state: TrainingState | None
) -> None:
    """Make ``folder`` a checkpoint that stands on its own: model, tokenizer and, if given, training state.

    Called by all processes at once. A crash, of one or all, leaves the old checkpoint or the new one, not half of one.
    """
    partial = on_main(lambda: begin_folder(folder))
    weights = _gathered(model)

    def finish() -> None:
        write_checkpoint(model, partial, weights)
        (partial / TOKENIZER).mkdir()
        for name, content in tokenizer.items():
            (partial / TOKENIZER / name).write_bytes(content)
        write_checksums(partial)
        finish_folder(folder)

    try:
        if state is not None:
            save_training_state(partial, model, *state)
        on_main(finish)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _gathered(model: Decoder) -> dict[str, Tensor]:
    """Whole weights in the memory of the main process, gathered one by one; nothing in the others."""
    weights = {}
    for name, tensor in checkpoint_weights(model).items():
        gathered = full_tensor(tensor)
        if world().is_main:
            weights[name] = gathered.cpu()
    return weights


def save_last(
    folder: Path, model: Decoder, tokenizer: Mapping[str, bytes], state: TrainingState, *, keep: int
) -> Path:
    """Write the checkpoint of the run in ``folder`` after ``state``'s step and keep the ``keep`` newest ones."""
    target = step_folder(folder, state[2].step)
    save_run(target, model, tokenizer, state)

    def replace_last() -> None:
        point_at(folder / LAST, target)
        for _, old in sorted(_steps(folder))[:-keep]:
            if old != target:
                remove_folder(old)
        for left in folder.glob(f".*{REMOVED}"):  # others had files of it open
            shutil.rmtree(left, ignore_errors=True)

    on_main(replace_last)
    return target


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of the run in ``folder``, which ``last`` then points at; None if there is none.

    Damaged ones that are newer are renamed to ``...damaged``, each after a warning. If none is complete, nothing is
    renamed, so that one that is mended is found by the next call.

    Raises: ValueError if there are, or were, checkpoints but none is complete.
    """
    for left in folder.glob(".step-*.previous"):  # one that was being written once more
        settle_folder(folder / left.stem[1:])
    _settle_last(folder, warn)
    path, damaged = newest_whole(folder)
    if path is not None:
        for other, reason in damaged:
            _set_aside(other, reason, warn)
        point_at(folder / LAST, path)
        return path
    for _, reason in damaged:
        warn(reason)
    _check_never_saved(folder, [path.name for path, _ in damaged])
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete checkpoint of a run, and the damaged ones that are newer with what is wrong; only read."""
    damaged: list[tuple[Path, str]] = []
    last = folder / LAST
    copies = [last] if last.is_dir() and not last.is_symlink() else []
    for path in [*(path for _, path in sorted(_steps(folder), reverse=True)), *copies]:
        damage = whole_damage(path)
        if not damage:
            return path, damaged
        damaged.append((path, damage))
    return None, damaged


def whole_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if nothing is."""
    complete = (checkpoint / CHECKSUMS).exists()
    return first_damage(checkpoint) if complete else f"{checkpoint / CHECKSUMS} is missing"


def _set_aside(path: Path, damage: str, warn: Callable[[str], None]) -> None:
    aside = path.with_name(path.name + DAMAGED)
    warn(f"{damage}; its checkpoint is set aside as {aside.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _settle_last(folder: Path, warn: Callable[[str], None]) -> None:
    """Make ``last`` no folder: a copy that resolved links (zip, rsync -L, object stores) has one in its place.

    It is the copy of a step's folder, or, if that is missing or damaged, becomes it.
    """
    last = folder / LAST
    if last.is_symlink() or not last.is_dir():
        return
    damage = whole_damage(last)
    if damage:
        _set_aside(last, damage, warn)
        return
    target = step_folder(folder, load_progress(last).step)
    damage = whole_damage(target) if target.exists() else ""
    if target.exists() and not damage:
        remove_folder(last)
        return
    if damage:
        _set_aside(target, damage, warn)
    last.rename(target)


def _check_never_saved(folder: Path, damaged: list[str]) -> None:
    """Raises: ValueError if there were checkpoints: to begin at step 0 would write over what is left of the run."""
    damaged = damaged or sorted(path.name for path in folder.glob(f"*{DAMAGED}"))
    remedy = "put a whole one back from a copy, or begin another run in another train.output_dir"
    if damaged:
        raise ValueError(
            f"train.resume: every checkpoint of {folder} is damaged ({', '.join(damaged)}); {remedy}"
        )
    if os.path.lexists(folder / LAST) or _has_saved(folder / SUMMARY):
        raise ValueError(f"train.resume: the checkpoints of {folder} are gone (step-...); {remedy}")


def _has_saved(summary: Path) -> bool:
    """Whether the run ended as one does that has saved its state. A damaged summary does not say."""
    try:
        return parse_json(summary.read_text())["status"] in ("finished", "interrupted")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def can_resume(folder: Path, identity: dict[str, Any], *, resume: bool) -> bool:
    """Whether ``folder`` holds the run that ``identity`` describes, begun before.

    Raises: ValueError if the folder holds a run and ``resume`` is false, or if it or one of its checkpoints is of a
        different run, or nothing tells of which.
    """
    checkpoints = [path for _, path in sorted(_steps(folder))]
    if (folder / LAST).is_dir() and not (folder / LAST).is_symlink():
        checkpoints.append(folder / LAST)
    others = [folder / name for name in (BEST, LAST, METRICS, SUMMARY) if os.path.lexists(folder / name)]
    described = (folder / RUN).exists()
    if not (described or checkpoints or others):
        return False
    if not resume:
        raise ValueError(
            f"train.output_dir: {folder} already holds a run; go on with --train.resume=auto or name another folder"
        )
    if described:
        _check_same_or_longer(folder, _identity_of_run(folder / RUN), identity)
    known = [(path, found) for path in checkpoints if (found := saved_identity(path)) is not None]
    lengths = _lengths(declared_identity(folder))
    for path, found in known:
        _check_same(f"{path} is a checkpoint of", found, identity, lengths)
    if not described and not known:
        names = ", ".join(path.name for path in checkpoints or others)
        raise ValueError(
            f"train.resume: {folder} holds {names} of a run, but no {RUN} that says of which; put it back, or name "
            "another train.output_dir"
        )
    for name in (METRICS, SUMMARY):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, wanted a file; move it away")
    return True


def _identity_of_run(file: Path) -> Any:
    try:
        return parse_json(file.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else "no mapping with 'identity'"
        raise ValueError(f"{file} is damaged ({reason}); name another train.output_dir") from error


def declared_identity(folder: Path) -> Any:
    """What the run in ``folder`` is by its ``run.json``, or by its newest checkpoint; None if neither says it."""
    if (folder / RUN).exists():
        return _identity_of_run(folder / RUN)
    newest = sorted(_steps(folder), reverse=True)
    return next((found for _, path in newest if (found := saved_identity(path)) is not None), None)


def history_of(identity: Any) -> list[dict[str, Any]]:
    """The events of a run: what it was begun from, and how it was changed."""
    found = identity.get(HISTORY) if isinstance(identity, dict) else None
    return [event for event in found if isinstance(event, dict)] if isinstance(found, list) else []


def without_history(identity: Any) -> Any:
    """What makes a run the run it is, however it came about."""
    if not isinstance(identity, dict):
        return identity
    return {name: value for name, value in identity.items() if name != HISTORY}


def _n_steps(identity: Any) -> int | None:
    """The run's ``train.steps``; None where a file says something else."""
    train = identity.get("train") if isinstance(identity, dict) else None
    found = train.get("steps") if isinstance(train, dict) else None
    return found if isinstance(found, int) else None


def _lengths(identity: Any) -> set[int]:
    """The values of ``train.steps`` that the run has and had in this folder, before it was raised."""
    found = [_n_steps(identity)]
    for event in reversed(history_of(identity)):
        if event.get("how") != RESUME:
            break
        changed = event.get("changed")
        found += changed.get("train.steps", []) if isinstance(changed, dict) else []
    return {steps for steps in found if steps is not None}


def _check_same_or_longer(folder: Path, found: Any, identity: dict[str, Any]) -> None:
    """``_check_same`` of a run that may be asked for more steps than it had, if it has made those."""
    before, wanted = _n_steps(found), identity["train"]["steps"]
    longer = before is not None and before < wanted
    advice = f"--train.continue_from={folder} goes on with other settings in another --train.output_dir"
    if before is not None and wanted < before:
        advice = f"give it {before} or more"
    _check_same(f"{folder} holds", found, identity, {before} if longer else (), advice)
    if longer and not _has_made(folder, before):
        raise ValueError(
            f"train.resume: {folder} holds a run that has not ended: train.steps was {before}, now {wanted}; go on to "
            f"step {before} first; or {advice}"
        )


def _has_made(folder: Path, steps: int | None) -> bool:
    """Whether the run in ``folder`` has come to its last step, this one."""
    if any(step == steps for step, _ in _steps(folder)):
        return True
    try:
        summary = parse_json((folder / SUMMARY).read_text())
        return bool(summary["status"] == "finished" and summary["steps"] == steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_same(
    what: str, found: Any, identity: dict[str, Any], lengths: Collection[int | None] = (), advice: str = ""
) -> None:
    """Raises: ValueError if ``found`` is another run; one whose ``train.steps`` is among ``lengths`` is not.

    Args:
        advice: what to do if the difference is one of text or training.
    """
    found = without_history(found)
    if _n_steps(found) in lengths:
        found = found | {"train": found["train"] | {"steps": identity["train"]["steps"]}}
    difference = first_difference(found, identity)
    if difference:
        remedy = f"; {advice}" if advice and difference.startswith(("data.", "train.")) else ""
        raise ValueError(f"train.resume: {what} a different run: {difference}{remedy}")


def claim(folder: Path, identity: dict[str, Any], data_folder: str) -> None:
    """Write ``run.json``: from now on ``folder`` belongs to this run."""
    write_atomically(
        folder / RUN, json.dumps({"identity": identity, "data_folder": data_folder}, indent=2) + "\n"
    )


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nested JSON values differ: dotted names, the old and the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Where two nested JSON values differ first, in words; empty if they are equal."""
    found = next(differences(old, new, name), None)
    return "" if found is None else f"{found[0]} was {found[1]!r}, now {found[2]!r}"
