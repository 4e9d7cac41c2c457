"""Where a run begins: with new weights, where it stopped, or with what another run has learned.

``run.json`` and every checkpoint keep the ``history`` of a run beside its settings: what it was begun from, and when it
was given more steps::

    {"how": "continue_from", "from": "runs/a", "checkpoint": "runs/a/step-00000300", "step": 300,
     "weights": {"model.safetensors": "<SHA-256>"}, "changed": {"train.lr": [0.003, 0.001]}, "lr": [0.0003, 0.00055]}

``changed`` holds the old and the new value of every setting that is another one (null if nothing says what they were),
``lr`` the learning rates of the steps before and after.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from helmholtz._checks import check
from helmholtz._files import complete_folder, sha256
from helmholtz._json import parse_json
from helmholtz._run_folder import BEST, METRICS, RUN, TOKENIZER
from helmholtz.data.tokenizer import check_exported_tokenizer, check_same_tokenizer
from helmholtz.models.checkpoint import is_exported, weight_files
from helmholtz.training.checkpoint import (
    HISTORY,
    RESUME,
    declared_identity,
    differences,
    history_of,
    newest_whole,
    whole_damage,
    without_history,
)
from helmholtz.training.config import TrainConfig
from helmholtz.training.optim import learning_rate
from helmholtz.training.state import VALUES, Progress, load_progress, saved_identity

ORIGINS = ("init_from", "continue_from")
KEPT = ("seq_len", "seed", "betas", "precision")
"""Settings that the position in the text, the optimizer's averages and the scaler of a continued run are made of."""
SCHEDULE = ("steps", "lr", "min_lr_ratio", "warmup_steps")


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with."""

    identity: dict[str, Any]
    """That of the run, with its history."""
    how: Literal["new", "resume", "init_from", "continue_from"] = "new"
    checkpoint: Path | None = None
    """Whose weights they are; of ``resume`` and ``continue_from`` all else too."""
    progress: Progress = field(default_factory=Progress)
    changed: bool = False
    """Whether the run goes on in its own folder with more steps than it had."""
    said: str = "begins with new weights"
    """The same in words: "the run ..."."""

    @property
    def is_own(self) -> bool:
        """Whether the run was begun before, in its folder."""
        return self.how == RESUME

    @property
    def first_step(self) -> int:
        """After which step the records of the run's folder begin."""
        origin = origin_of(self.identity)
        step = None if origin is None or origin["how"] != "continue_from" else origin.get("step")
        return step if isinstance(step, int) else 0


def origin_of(identity: Any) -> dict[str, Any] | None:
    """The event with which the run's folder was begun; None of a run with new weights."""
    return next((event for event in reversed(history_of(identity)) if event.get("how") in ORIGINS), None)


def find_start(
    train: TrainConfig,
    identity: dict[str, Any],
    tokenizer: Path,
    *,
    begun: bool,
    newest: Callable[[Path], Path | None],
    warn: Callable[[str], None],
) -> Start:
    """How the run of these settings begins; the disk is only read, but for what ``newest`` does.

    Args:
        identity: of the run, without history.
        tokenizer: folder of that of its text.
        begun: whether ``train.output_dir`` holds the run.
        newest: its newest checkpoint.

    Raises: ValueError if what it is to begin with is not there, or does not fit the run.
    """
    folder = Path(train.output_dir)
    if begun:
        declared, checkpoint = declared_identity(folder), newest(folder)
        _check_origin(train, origin_of(declared), folder, saved=checkpoint is not None)
        if checkpoint is not None:
            return _resumed(train, identity, checkpoint, saved_identity(checkpoint) or declared)
    if train.init_from is not None:
        return _initialised(train.init_from, identity, tokenizer)
    if train.continue_from is not None:
        return _continued(train.continue_from, train, identity, tokenizer, warn)
    return Start(identity)


def _check_origin(train: TrainConfig, origin: dict[str, Any] | None, folder: Path, *, saved: bool) -> None:
    """A run that is gone on with was begun with what its settings say; before its first checkpoint they must say it."""
    begun = "with new weights" if origin is None else f"with train.{origin['how']}={origin.get('from')}"
    for how in ORIGINS:
        asked = getattr(train, how)
        same = origin is not None and origin["how"] == how and asked is not None
        same = same and Path(asked).resolve() == Path(str(origin and origin.get("from"))).resolve()
        if asked is not None and not same:
            raise ValueError(
                f"train.{how} must be as it was when the run in {folder} began ({begun}), or absent, got {asked!r}; to "
                "begin another run, name another train.output_dir"
            )
        if asked is None and not saved and origin is not None and origin["how"] == how:
            raise ValueError(
                f"train.resume: the run in {folder} has no checkpoint yet and was begun {begun}: give that again"
            )


def _resumed(train: TrainConfig, identity: dict[str, Any], checkpoint: Path, found: Any) -> Start:
    """Of its own checkpoint, from which it can differ in ``train.steps`` only."""
    history, progress = history_of(found), load_progress(checkpoint)
    changed = _changes(found, identity)
    said = f"goes on from {checkpoint}"
    if changed:
        before = changed["train.steps"][0]
        rates = _rates(progress.step, found["train"], train)
        history = [*history, _event(RESUME, checkpoint, checkpoint, progress.step, changed) | {"lr": rates}]
        said += f" with train.steps {before} -> {train.steps}; {_rates_said(rates, progress.step, train)}"
    elif progress.step == train.steps:
        said = f"has ended, at step {train.steps}; to go on, raise train.steps"
    return Start(_with(identity, history), "resume", checkpoint, progress, bool(changed), said)


def _initialised(asked: str, identity: dict[str, Any], tokenizer: Path) -> Start:
    """With the weights of another run at step 0."""
    folder = Path(asked)
    if is_exported(folder):
        check_exported_tokenizer(folder / "tokenizer.json", tokenizer)
        found, step = None, None
    else:
        folder = _weights_folder(folder)
        _check_tokenizer("train.init_from", folder, tokenizer)
        found, step = _whose(folder), _step_of_weights(folder)
    changed = None if found is None else _changes(found, identity)
    event = _event("init_from", Path(asked), folder, step, changed)
    after = "" if step is None else f" after step {step}"
    said = f"begins at step 0 with the weights of {folder}{after} and a new optimizer"
    return Start(_with(identity, [event]), "init_from", folder, said=said)


def _continued(
    asked: str, train: TrainConfig, identity: dict[str, Any], tokenizer: Path, warn: Callable[[str], None]
) -> Start:
    """From the state of another run, in a folder of its own."""
    checkpoint = _state_folder(Path(asked), warn)
    found = _whose(checkpoint)
    if found is None:
        raise ValueError(
            f"train.continue_from: nothing says of which run {checkpoint} is ({RUN} is missing); its weights can "
            f"begin a new one: --train.init_from={checkpoint}"
        )
    for name, old, new in differences(without_history(found), identity):
        group, _, field_name = name.partition(".")
        if not (group == "data" or (group == "train" and field_name not in KEPT)):
            raise ValueError(
                f"train.continue_from: {name} was {old!r} in the run of {checkpoint}, now {new!r}, and cannot change "
                f"within a run; give it as it was, or begin a new run with the weights: --train.init_from={asked}"
            )
    _check_tokenizer("train.continue_from", checkpoint, tokenizer)
    progress, changed = load_progress(checkpoint), _changes(found, identity)
    step = progress.step
    check(train.steps > step, "train.steps", train.steps, f"more than {step}, the steps of {checkpoint}")
    other_text = any(name.startswith("data.") for name in changed)
    before = progress.windows if other_text else progress.windows_before
    progress = replace(progress, best=math.inf, windows_before=before)  # the folder has no best weights yet
    rates = _rates(step, found["train"], train)
    event = _event("continue_from", Path(asked), checkpoint, step, changed) | {"lr": rates}
    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name != DATA)
    text = "; another text, read from its beginning" if other_text else ""
    said = f"goes on from {checkpoint} with {listed or 'the same settings'}{text}; "
    said += _rates_said(rates, step, train)
    history = [*history_of(found), event]
    return Start(_with(identity, history), "continue_from", checkpoint, progress, said=said)


DATA = "data.fingerprint"


def _state_folder(path: Path, warn: Callable[[str], None]) -> Path:
    """The checkpoint ``path`` itself if it can be gone on from, or the newest whole one of the run in ``path``."""
    folder = complete_folder(path)
    if (folder / VALUES).is_file():
        folder = folder.resolve() if folder.is_symlink() else folder
        if damage := whole_damage(folder):
            raise ValueError(f"train.continue_from: {damage}")
        return folder
    found, damaged = newest_whole(path)
    for other, damage in damaged:
        warn(f"{damage}; {other.name} is passed over")
    if found is None:
        raise ValueError(
            f"train.continue_from: {path} is neither a run with a whole checkpoint (step-...) nor such a checkpoint; "
            "weights alone (best, an exported folder) begin a new run: --train.init_from"
        )
    return found


def _weights_folder(path: Path) -> Path:
    """A checkpoint itself, or the best one of a run."""
    for folder in (path, path / BEST):
        if (complete_folder(folder) / "config.json").exists():
            return folder
    raise ValueError(
        f"train.init_from: {path} is neither a checkpoint (config.json), nor a run that has one "
        f"({BEST}/config.json), nor an exported model"
    )


def _check_tokenizer(name: str, checkpoint: Path, tokenizer: Path) -> None:
    if not (complete_folder(checkpoint) / TOKENIZER).is_dir():
        raise ValueError(
            f"{name}: {checkpoint} has no {TOKENIZER}/, so nothing says whether its ids are those of the text; copy "
            "the one that it was trained with there"
        )
    check_same_tokenizer(checkpoint / TOKENIZER, tokenizer)


def _whose(checkpoint: Path) -> Any:
    """The identity of the run that wrote a checkpoint; None if nothing says it."""
    found = saved_identity(checkpoint)
    run = checkpoint.absolute().parent
    return declared_identity(run) if found is None and (run / RUN).exists() else found


def _step_of_weights(checkpoint: Path) -> int | None:
    """After which step they were saved: ``best`` is that of the last evaluation that was marked so."""
    if (complete_folder(checkpoint) / VALUES).is_file():
        return load_progress(checkpoint).step
    metrics = checkpoint.absolute().parent / METRICS
    if checkpoint.name != BEST or not metrics.is_file():
        return None
    steps = [record["step"] for record in _records(metrics) if record.get("best") is True]
    return steps[-1] if steps else None


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue  # a line cut off by a crash
        if isinstance(record, dict):
            yield record


def _changes(found: Any, identity: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [old, new] for name, old, new in differences(without_history(found), identity)}


def _event(how: str, asked: Path, checkpoint: Path, step: int | None, changed: Any) -> dict[str, Any]:
    weights = {file.name: sha256(file) for file in weight_files(complete_folder(checkpoint))}
    return {
        "how": how,
        "from": str(asked),
        "checkpoint": str(checkpoint),
        "step": step,
        "weights": weights,
        "changed": changed,
    }


def _with(identity: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    return identity | ({HISTORY: history} if history else {})


def _rates(step: int, before: dict[str, Any], train: TrainConfig) -> list[float]:
    """Learning rates of the last step under the settings it was made with, and of the next under the new ones."""
    old = replace(train, **{name: before[name] for name in SCHEDULE})
    return [learning_rate(max(0, step - 1), old), learning_rate(step, train)]


def _rates_said(rates: list[float], step: int, train: TrainConfig) -> str:
    old, new = rates
    if old == new:
        return f"the learning rate stays {new:.4g}"
    last = learning_rate(train.steps - 1, train)
    return (
        f"the learning rate, {old:.4g} in step {step}, is {new:.4g} in step {step + 1} and {last:.4g} at the end, "
        f"as in a run of {train.steps} steps"
    )
