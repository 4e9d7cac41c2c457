"""Training over loaders in the original names. For long runs: ``helmholtz train``, which resumes to the bit."""

import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from helmholtz._checks import check, check_integer, check_positive
from helmholtz.interop.seeds import checkpoints
from helmholtz.interop.seeds.unified.config import TRAINING_KEYS
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ
from helmholtz.interop.seeds.unified.objectives import Batch, UnifiedTrainingObjective, read_batch
from helmholtz.models.base import evaluation_mode
from helmholtz.training.equilibrium import SolverStage, training_solver
from helmholtz.training.fit import optimizer_step


@dataclass(slots=True, kw_only=True)
class CurriculumConfig:
    """How training becomes more demanding: solver settings by stage, and when it begins to write into the memory."""

    warmup_steps: int = 500
    """Steps of the first stage."""
    stage_steps: int = 2000
    """Steps of each stage after it; the last one goes on."""
    max_iter_schedule: tuple[int, ...] = (10, 20, 30)
    tolerance_schedule: tuple[float, ...] = (1e-2, 5e-3, 1e-3)
    memory_enable_step: int = 1000
    """Steps after which new equilibria are written, if the model has slots (``n_slots``)."""

    def __post_init__(self) -> None:
        check_integer("warmup_steps", self.warmup_steps)
        check_integer("stage_steps", self.stage_steps)
        check_integer("memory_enable_step", self.memory_enable_step, minimum=0)
        n, n_tolerances = len(self.max_iter_schedule), len(self.tolerance_schedule)
        wanted = f"as long as max_iter_schedule: {n}"
        check(n == n_tolerances > 0, "tolerance_schedule", n_tolerances, wanted)
        for begin in range(n):
            self._stage(begin)

    def _stage(self, index: int) -> SolverStage:
        begin = 0 if index == 0 else self.warmup_steps + (index - 1) * self.stage_steps
        return SolverStage(
            from_step=begin, max_steps=self.max_iter_schedule[index], rtol=self.tolerance_schedule[index]
        )

    def stage(self, step: int) -> SolverStage:
        """The solver settings after ``step`` optimizer steps."""
        stages = [self._stage(index) for index in range(len(self.max_iter_schedule))]
        return [stage for stage in stages if stage.from_step <= step][-1]


class UnifiedModelTrainer:
    """Epochs over a loader: objective, backward, clipping, optimizer, curriculum, validation.

    The curriculum acts during training steps only; validation, and the model afterwards, solve with the model's own
    settings.

    Args:
        train_loader, val_loader: anything that can be iterated over again and yields batches (``objectives.Batch``).
        gradient_clip: largest gradient norm; None does not clip.
    """

    def __init__(
        self,
        model: UnifiedMambaHopfieldDEQ,
        optimizer: torch.optim.Optimizer,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        objective: UnifiedTrainingObjective | None = None,
        *,
        curriculum: CurriculumConfig | None = None,
        gradient_clip: float | None = 1.0,
    ) -> None:
        is_ours = isinstance(model, UnifiedMambaHopfieldDEQ)
        check(is_ours, "model", type(model).__name__, "a UnifiedMambaHopfieldDEQ")
        if gradient_clip is not None:
            check_positive("gradient_clip", gradient_clip)
        self.model, self.optimizer = model, optimizer
        self.train_loader, self.val_loader = train_loader, val_loader
        self.objective = UnifiedTrainingObjective() if objective is None else objective
        self.curriculum = CurriculumConfig() if curriculum is None else curriculum
        self.gradient_clip = gradient_clip
        self.step = 0

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        model: UnifiedMambaHopfieldDEQ,
        train_data: Dataset[Any],
        val_data: Dataset[Any] | None = None,
        objective: UnifiedTrainingObjective | None = None,
    ) -> "UnifiedModelTrainer":
        """AdamW and shuffled loaders from the README's ``learning_rate``, ``batch_size`` and ``gradient_clip``.

        Args:
            train_data, val_data: items of equally long ids, as torch's ``DataLoader`` takes them; a list will do.
        """
        for name in TRAINING_KEYS:
            check(name in config, "config", sorted(config), f"a dictionary with {name!r}")
        check_positive("learning_rate", config["learning_rate"])
        size = config["batch_size"]
        check_integer("batch_size", size)
        train_loader = DataLoader(train_data, batch_size=size, shuffle=True)
        val_loader = None if val_data is None else DataLoader(val_data, batch_size=size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
        clip = config["gradient_clip"]
        return cls(model, optimizer, train_loader, val_loader, objective, gradient_clip=clip)

    def train(self, num_epochs: int, *, progress: bool = True) -> list[dict[str, float]]:
        """Train; per epoch the mean of each metric over its targets, those of validation with the prefix ``val_``."""
        check_integer("num_epochs", num_epochs)
        history = []
        for epoch in range(num_epochs):
            batches: Iterable[Batch] = self.train_loader
            total = len(batches) if isinstance(batches, Sized) else None
            if progress:
                batches = track(batches, f"epoch {epoch + 1} of {num_epochs}", total=total)
            found = [(self.train_step(batch), _num_targets(batch)) for batch in batches]
            metrics = _means(found, "train_loader")
            if self.val_loader is not None:
                metrics |= {f"val_{name}": value for name, value in self.validate().items()}
            history.append(metrics)
        return history

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step; the metrics of its batch.

        Raises: NonFiniteError, before the weights are touched, if loss or gradient are not finite.
        """
        self.model.train()
        with training_solver(self.model.model, self.curriculum.stage(self.step)):
            loss, metrics, found = self.objective.solve(self.model, self._on_device(batch))
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = optimizer_step(self.model, self.optimizer, loss, step=self.step + 1, clip_norm=limit)
        if self.model.config.n_slots and self.step >= self.curriculum.memory_enable_step:
            self.model.model.write_memory(found)
        self.step += 1
        return metrics | {"grad_norm": norm.item()}

    def validate(self) -> dict[str, float]:
        """Mean of each metric over the targets of the validation loader; the model stays in the mode it was in."""
        check(self.val_loader is not None, "val_loader", None, "given, to validate")
        assert self.val_loader is not None
        with evaluation_mode(self.model):
            found = [
                (self.objective.compute_loss(self.model, self._on_device(batch))[1], _num_targets(batch))
                for batch in self.val_loader
            ]
        return _means(found, "val_loader")

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Make the folder ``path`` a checkpoint of model, optimizer, step and random state; nothing is pickled."""
        checkpoints.save_checkpoint(self.model, self.optimizer, self.step, path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint of the same sizes. Raises: ValueError for another model's or a pickled file."""
        self.step = checkpoints.load_checkpoint(self.model, self.optimizer, path)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.model.memory_patterns.device
        ids, targets = read_batch(batch)
        return ids.to(device), targets.to(device)


def _num_targets(batch: Batch) -> int:
    return int((read_batch(batch)[1] != -100).sum())


def _means(rows: Sequence[tuple[Mapping[str, Any], int]], loader: str) -> dict[str, float]:
    """Mean of each plain number, every batch with the weight of its targets: the last may be a smaller one."""
    check(bool(rows), loader, "no batch", "at least one (a generator can be read only once)")
    names = [name for name, value in rows[0][0].items() if isinstance(value, int | float)]
    total = sum(weight for _, weight in rows) or 1
    return {name: sum(row[name] * weight for row, weight in rows) / total for name in names}
