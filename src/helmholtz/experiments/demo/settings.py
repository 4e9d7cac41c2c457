"""What the demo computes, and what a result of it depends on."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from helmholtz.experiments.letters.run import PROFILES, LetterExperiment

PACKAGE = Path(__file__).resolve().parents[2]

Note = Callable[[str, float], None]
"""Told what a part does, and which fraction of the part is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes that take about three minutes on two cores."""

    seed: int = 0
    models: tuple[str, ...] = ("baseline", "fem_softmax", "mamba")
    """Files of ``configs/demo``."""
    overrides: tuple[str, ...] = ("--train.steps=200", "--train.eval_every=50", "--train.save_every=50")
    """Options of ``helmholtz train``, after those files."""
    data: tuple[str, ...] = ()
    """Options of ``helmholtz data`` and ``train``, after those files."""
    sample_tokens: int = 80
    kappa_bits: float = 0.5
    letters: LetterExperiment = replace(PROFILES["ci"], steps=400, lr=4e-3)
    selection_channels: int = 4000
    selection_steps: int = 100
    recall_sizes: tuple[int, ...] = (10, 100, 1000)
    recall_trials: int = 500
    resolution: int = 61
    """Points along a side of the energy's slice; odd."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with a checksum of the package: a result holds for the code that gave it."""
        values = asdict(self) | {"code": code_checksum()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def code_checksum() -> str:
    """Of every source file of the package."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".h", ".cpp"):
            found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]
