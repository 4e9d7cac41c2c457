"""Trained runs, read back from their folders."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helmholtz._files import read_complete
from helmholtz._json import parse_json
from helmholtz._run_folder import BEST, METRICS, RUN, SUMMARY


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run on disk."""

    folder: Path
    description: dict[str, Any]
    """Architecture, model, data (a fingerprint of it) and settings."""
    data_folder: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def checkpoint(self) -> Path:
        """The weights of lowest validation loss."""
        return self.folder / BEST

    def series(self, kind: str, value: str) -> tuple[list[int], list[float]]:
        """Tokens seen and ``value``, from the records of one kind ("step" or "eval") in which it was finite."""
        records = [record for record in self.metrics if record["kind"] == kind]
        for record in records:
            _check_fields(self.folder / METRICS, record, {value: (int, float, type(None))})
        finite = [record for record in records if record[value] is not None]
        return [record["tokens"] for record in finite], [record[value] for record in finite]

    def train_tokens_per_second(self) -> float:
        """Median over the logged steps, so that a pause of the machine does not count; of the whole run if none was."""
        logged = self.series("step", "tokens_per_second")[1]
        return statistics.median(logged) if logged else self.summary["tokens"] / self.summary["seconds"]


Fields = Mapping[str, type | tuple[type, ...]]
SUMMARY_FIELDS: Fields = {
    "tokens": int,
    "seconds": (int, float),
    "parameters": int,
    "peak_memory_bytes": (int, type(None)),
    "commit": str,
}


def _read(file: Path, fields: Fields, *, lines: bool = False) -> list[dict[str, Any]]:
    """The JSON object of a file, or that of each line. Raises: ValueError naming the file if it is damaged."""
    try:
        text = file.read_text()
        found = [parse_json(part) for part in (text.splitlines() if lines else [text])]
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for content in found:
        _check_fields(file, content, fields)
    return found


def _check_fields(file: Path, content: Any, fields: Fields) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: wanted an object, got {content!r:.60}")
    for name, kind in fields.items():
        got = content.get(name, "nothing")
        if name not in content or not isinstance(got, kind) or isinstance(got, bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{file} is damaged: {name} must be {wanted}, got {got!r:.60}")


def _check_description(file: Path, identity: dict[str, Any]) -> None:
    """That what others read of a run is there."""
    _check_fields(file, identity, {"architecture": str, "model": dict, "data": dict, "train": dict})
    _check_fields(file, identity["data"], {"fingerprint": str})
    _check_fields(file, identity["train"], {"seq_len": int, "batch_size": int, "seed": int})
    objective = identity.get("objective")
    if objective is not None:
        known = isinstance(objective, dict) and "kappa_bits" not in objective
        _check_fields(file, objective, {} if known else {"kappa_bits": (int, float)})


def read_run(folder: str | Path) -> Run:
    """The run in ``folder``. Raises: ValueError if there is none, it is not finished, or a file is damaged."""
    folder = Path(folder)
    if not (folder / RUN).exists():
        raise ValueError(f"{folder}: no run here ({RUN} is missing)")
    if not (folder / SUMMARY).exists():
        raise ValueError(f"{folder}: the run has not ended yet; go on with --train.resume=auto")
    (summary,) = _read(folder / SUMMARY, {"status": str, "steps": int})
    if summary["status"] != "finished":
        raise ValueError(f"{folder}: the run is {summary['status']} at step {summary['steps']}, not finished")
    _check_fields(folder / SUMMARY, summary, SUMMARY_FIELDS)
    metrics = _read(folder / METRICS, {"kind": str, "step": int, "tokens": int}, lines=True)
    last = max((record["step"] for record in metrics), default=0)
    if last < summary["steps"]:
        raise ValueError(f"{folder / METRICS} is damaged: it ends at step {last} of {summary['steps']}")
    (run,) = _read(folder / RUN, {"identity": dict, "data_folder": str})
    _check_description(folder / RUN, run["identity"])
    return Run(folder, run["identity"], run["data_folder"], summary, metrics)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder itself, or the best checkpoint of a run. Raises: ValueError if ``path`` is neither."""
    path = Path(path)
    for folder in (path, path / BEST):
        if read_complete(folder, lambda found: (found / "config.json").exists()):
            return folder  # not what it is called while it is replaced
    raise ValueError(
        f"{path}: neither a checkpoint (config.json) nor a run that has one ({BEST}/config.json)"
    )


def training_data(run: str | Path) -> str:
    """Folder of the prepared text that a run was trained on. Raises: ValueError if ``run`` is a bare checkpoint."""
    description = Path(run) / RUN
    if not description.exists():
        raise ValueError(
            f"data: {run} is a checkpoint that knows no training data; name a folder with --data"
        )
    (found,) = _read(description, {"data_folder": str})
    folder: str = found["data_folder"]
    return folder
