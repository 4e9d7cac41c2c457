"""The trained models that the explorer offers, by name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helmholtz._run_folder import BEST, RUN
from helmholtz.evals.checkpoints import Checkpoint, open_checkpoint
from helmholtz.evals.inspection import mixers, readable
from helmholtz.models.checkpoint import architecture_of
from helmholtz.models.decoder import Decoder

Part = Literal["reader", "plan", "equilibrium"]
WANTED: dict[Part, str] = {
    "reader": "a Free Energy Mixer or attention",
    "plan": "a latent plan (a Free Transformer)",
    "equilibrium": "a per-token equilibrium (Mamba-Hopfield)",
}
MOST_FOUND = 12
"""Runs that are offered where none is named."""
HOW = "train some with `make demo` (one of every kind: `make demo-full`) or name them with `--checkpoint RUN ...`"
TRAINED: dict[Part, str] = {"reader": "fem_lm", "plan": "free_transformer", "equilibrium": "mamba_hopfield"}
"""The architecture that has the part."""


@dataclass(frozen=True)
class OfferedRun:
    """A run or a bare checkpoint, and its model."""

    name: str
    folder: Path
    """As it was named."""
    checkpoint: Checkpoint

    @property
    def summary(self) -> str:
        model = self.checkpoint.model
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        return f"{self.name}: {architecture_of(model)}, {n_parameters:,} parameters"


@dataclass(frozen=True)
class Offer:
    """What can be chosen, and what was left out."""

    runs: dict[str, OfferedRun]
    left_out: tuple[str, ...] = ()

    def names(self, part: Part | None = None) -> list[str]:
        """Of the runs whose model has the part; as readers, those with a Free Energy Mixer come before attention."""
        found = [name for name, run in self.runs.items() if part is None or has(run.checkpoint.model, part)]
        if part == "reader":
            found.sort(key=lambda name: not mixers(self.runs[name].checkpoint.model))
        return found

    def missing(self, part: Part) -> str:
        """One line for a tab that has no model to show."""
        if not self.runs:
            return f"There is no run yet: {HOW}."
        train = (
            f"helmholtz train --model.architecture {TRAINED[part]} --train.output_dir runs/{TRAINED[part]}"
        )
        return (
            f"None of the runs ({', '.join(self.runs)}) has {WANTED[part]}. `{train}` trains one, and `make demo-full` "
            "one of every kind. Then start the explorer again, or name the run with `--checkpoint`."
        )


def has(model: Decoder, part: Part) -> bool:
    return bool(readable(model)) if part == "reader" else getattr(model, part) is not None


def find_runs(root: Path) -> list[Path]:
    """Folders of runs below ``root`` that have weights: the demo's if there are any, else all, in order of names."""
    found = sorted(file.parent for file in root.rglob(RUN) if (file.parent / BEST / "config.json").exists())
    return [run for run in found if run.relative_to(root).parts[0] == "demo"] or found


def offer(folders: Sequence[str | Path]) -> Offer:
    """The named runs or checkpoints. Raises: ValueError if one of them cannot be read."""
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    counts = Counter(path.resolve().name for path in paths)
    runs = {}
    for path in paths:
        short = path.resolve().name
        name = short if counts[short] == 1 else str(path)
        runs[name] = OfferedRun(name, path, open_checkpoint(str(path)))
    return Offer(runs)


def offer_found(root: Path) -> Offer:
    """The runs below ``root``; what cannot be read, and what is too much, is left out and named."""
    folders, left_out = find_runs(root), []
    usable = []
    for folder in folders[:MOST_FOUND]:
        try:
            open_checkpoint(str(folder))
        except ValueError as error:
            left_out.append(str(error))
        else:
            usable.append(folder)
    if len(folders) > MOST_FOUND:
        left_out.append(f"{len(folders) - MOST_FOUND} more runs below {root}: name those you want")
    return Offer(offer(usable).runs, tuple(left_out))
