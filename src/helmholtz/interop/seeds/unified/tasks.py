"""The two memory experiments in the original names, over ``helmholtz.evals``."""

from typing import Any

from helmholtz._checks import check_integer
from helmholtz.experiments.continual.run import (
    ContinualConfig,
    ContinualLearning,
    ContinualResult,
    MemoryKeys,
)
from helmholtz.experiments.recall.data import MapTask, PairTask
from helmholtz.experiments.recall.patterns import Corruption, RecallResult, by_size_and_level, recall_patterns
from helmholtz.experiments.recall.run import InContextRecall, InContextResult
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ

SIZES = (16, 64, 256)
NOISES = (0.0, 0.25, 0.5, 1.0, 1.5)


class AssociativeRecallExperiment:
    """What a memory of the model's width and temperature recalls of random patterns (``helmholtz study recall``).

    Nothing is trained: the patterns are written, corrupted by noise and settled again.

    Attributes:
        details: every ``RecallResult`` of the last ``evaluate``: the nearest neighbour and an oracle beside it,
            iterations, energies.
    """

    def __init__(self, model: UnifiedMambaHopfieldDEQ, *, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.details: list[RecallResult] = []

    def evaluate(self, num_trials: int = 100) -> dict[int, dict[float, float]]:
        """Accuracy by number of patterns (16, 64, 256 and the model's own) and by noise relative to a pattern's norm.

        Warns (``MarginWarning``) where so many patterns cannot be told apart at this width.
        """
        config = self.model.config
        sizes = sorted({*SIZES, config.memory_size})
        self.details = [
            recall_patterns(
                config.d_model,
                size,
                Corruption("noise", noise),
                beta=config.beta,
                n_trials=num_trials,
                seed=self.seed,
            )
            for size in sizes
            for noise in NOISES
        ]
        return by_size_and_level(self.details)

    def train(self, steps: int, num_pairs: int = 4) -> InContextResult:
        """Train the model itself on ``k1 v1 ... kP vP q -> v`` and measure it on sequences it has not seen.

        With 16 keys and as many values. A model that has not learned it is at ``result.chance``.
        """
        task = PairTask(n_pairs=num_pairs)
        learner = InContextRecall(self.model.model, task, seed=self.seed)
        learner.train(steps)
        return learner.evaluate()


class ContinualLearningExperiment:
    """Random maps over shared inputs and labels, learned one after another by a model (``helmholtz study continual``).

    The model is trained. A memory beside it is written as the pairs are read and answers where it knows the key; its
    keys come from frozen vectors, so that training does not move them.

    Args:
        keys: "ngram", "none" for no memory, or "features", keys that drift with training, as a control.

    Attributes:
        result: the ``ContinualResult`` of the last run: accuracy, backward transfer, forgetting, bytes of the memory.
    """

    def __init__(
        self, model: UnifiedMambaHopfieldDEQ, num_tasks: int = 5, *, keys: MemoryKeys = "ngram", seed: int = 0
    ) -> None:
        check_integer("num_tasks", num_tasks)
        task = MapTask(n_tasks=num_tasks)
        config = ContinualConfig(task=task, keys=keys, n_slots=num_tasks * task.n_inputs)
        self._learning = ContinualLearning(model.model, config, seed=seed)
        self.result: ContinualResult | None = None

    def run_continual_learning(self) -> list[dict[str, Any]]:
        """Learn all maps; per map learned its number and the accuracies of all of them at that moment."""
        self.result = self._learning.run()
        return [
            {"task": number, "accuracies": list(row), "mean_accuracy": sum(row[: number + 1]) / (number + 1)}
            for number, row in enumerate(self.result.matrix)
        ]
