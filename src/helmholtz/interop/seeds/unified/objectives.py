"""The training objective in the original names, with terms that are bounded and have gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_keys, check_non_negative
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ
from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.ops.losses import cross_entropy
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
"""Ids ``B T+1`` whose next tokens are the targets; a pair ``(ids, targets)``; or ``input_ids`` and maybe ``labels``."""


def read_batch(batch: Batch) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Ids and, aligned with them, what follows each; -100 is ignored.

    Raises: ValueError for anything but the three forms of a batch, or shapes that differ.
    """
    if isinstance(batch, Tensor):
        check(
            batch.ndim == 2 and batch.shape[1] > 1, "batch", tuple(batch.shape), "of shape (B, T) with T > 1"
        )
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, Mapping):
        check_keys("batch", batch, ("input_ids", "labels"))
        check("input_ids" in batch, "batch", sorted(batch), "a dictionary with 'input_ids'")
        if "labels" not in batch:
            return read_batch(batch["input_ids"])
        ids, targets = batch["input_ids"], batch["labels"]
    else:
        check(len(batch) in (1, 2), "batch", f"{len(batch)} items", "ids, or ids and targets")
        if len(batch) == 1:
            return read_batch(batch[0])
        ids, targets = batch
    wanted = f"of the shape {tuple(ids.shape)} of the ids"
    check(ids.shape == targets.shape, "targets", tuple(targets.shape), wanted)
    return ids, targets


class UnifiedTrainingObjective:
    r"""``task_weight`` cross-entropy + three terms of the equilibria (``helmholtz.training.equilibrium``).

    ``energy_weight`` weighs the bounded retrieval energy of an equilibrium's direction, ``convergence_weight`` the
    distance from start to equilibrium, ``stability_weight`` the excess of the local Lipschitz constant over
    ``contraction_target``. In the original the first is unbounded below, the second a constant, and the third a
    mean over random directions, which underestimates.
    """

    def __init__(
        self,
        task_weight: float = 1.0,
        energy_weight: float = 0.1,
        convergence_weight: float = 0.05,
        stability_weight: float = 0.01,
        contraction_target: float = 0.9,
    ) -> None:
        check_non_negative("task_weight", task_weight)
        self.task_weight = task_weight
        self._equilibrium = EquilibriumObjective(
            EquilibriumObjectiveConfig(
                energy_weight=energy_weight,
                convergence_weight=convergence_weight,
                stability_weight=stability_weight,
                contraction_target=contraction_target,
            )
        )

    def compute_loss(
        self, model: UnifiedMambaHopfieldDEQ, batch: Batch
    ) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The loss of a batch and, as plain values, its terms and how the solver fared; one pass through the model.

        A term of weight 0 is not computed and is missing from the values.
        """
        return self.solve(model, batch)[:2]

    def solve(
        self, model: UnifiedMambaHopfieldDEQ, batch: Batch
    ) -> tuple[Float[Tensor, ""], dict[str, Any], Equilibrium]:
        """``compute_loss`` and the equilibria it found."""
        ids, targets = read_batch(batch)
        output = model.model(ids)
        task = cross_entropy(output.logits, targets)
        weighted = {"task": (self.task_weight, task)}
        weighted |= self._equilibrium.terms(model.model.equilibrium, output.equilibrium)
        loss = torch.stack([weight * term for weight, term in weighted.values()]).sum()
        terms = {"total": loss} | {name: term for name, (_, term) in weighted.items()}
        return loss, _metrics(output.equilibrium, terms), output.equilibrium


def _metrics(found: Equilibrium, terms: Mapping[str, Tensor]) -> dict[str, Any]:
    components = found.components()
    return {name: term.item() for name, term in terms.items()} | {
        "num_iterations": int(found.solution.num_steps.max()),
        "converged_fraction": found.solution.converged.float().mean().item(),
        "energy_components": {name: value.mean().item() for name, value in components._asdict().items()},
    }
