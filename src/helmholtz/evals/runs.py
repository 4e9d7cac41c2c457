"""Trained runs, read back from their folders."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helmholtz._files import complete_folder
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
        return complete_folder(self.folder / BEST)

    def series(self, kind: str, value: str) -> tuple[list[int], list[float]]:
        """Tokens seen and ``value``, from the records of one kind ("step" or "eval")."""
        records = [record for record in self.metrics if record["kind"] == kind]
        return [record["tokens"] for record in records], [record[value] for record in records]

    def train_tokens_per_second(self) -> float:
        """Median over the logged steps, so that a pause of the machine does not count; of the whole run if none was."""
        logged = self.series("step", "tokens_per_second")[1]
        return statistics.median(logged) if logged else self.summary["tokens"] / self.summary["seconds"]


def read_run(folder: str | Path) -> Run:
    """The run in ``folder``. Raises: ValueError if there is none, or it is not finished."""
    folder = Path(folder)
    if not (folder / RUN).exists():
        raise ValueError(f"{folder}: no run here ({RUN} is missing)")
    if not (folder / SUMMARY).exists():
        raise ValueError(f"{folder}: the run has not ended yet; go on with --train.resume=auto")
    summary = json.loads((folder / SUMMARY).read_text())
    if summary["status"] != "finished":
        raise ValueError(f"{folder}: the run is {summary['status']} at step {summary['steps']}, not finished")
    metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    run = json.loads((folder / RUN).read_text())
    return Run(folder, run["identity"], run["data_folder"], summary, metrics)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder itself, or the best checkpoint of a run. Raises: ValueError if ``path`` is neither."""
    path = Path(path)
    for folder in (complete_folder(path), complete_folder(path / BEST)):
        if (folder / "config.json").exists():
            return folder
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
    folder: str = json.loads(description.read_text())["data_folder"]
    return folder
