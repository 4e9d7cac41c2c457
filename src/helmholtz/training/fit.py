"""Training on examples that fit in memory, stopped early by a validation loss: for small supervised studies."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz._checks import check_integer
from helmholtz.models.base import evaluation_mode
from helmholtz.training.config import TrainConfig
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.optim import learning_rate, make_optimizer

ORDER_SEED = 3_000_017
"""Added to the seed: weights and order come from different streams."""

LossFunction = Callable[[Int[Tensor, "n"]], Float[Tensor, ""]]
"""Of the indices of a batch's examples."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A point of the learning curve."""

    step: int
    train: float
    """Mean training loss since the point before."""
    validation: float


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training went; the model is left with the weights of ``best``."""

    steps: int
    """Steps made; fewer than allowed if it was stopped early."""
    best: Evaluation
    curve: list[Evaluation]


def fit(
    model: nn.Module,
    config: TrainConfig,
    n_examples: int,
    loss: LossFunction,
    validate: Callable[[], float],
    *,
    patience: int,
    callback: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Fit:
    """Minimise ``loss`` over shuffled epochs and keep the weights of the lowest ``validate()``.

    AdamW, warm-up, cosine and clipping are those of ``config``; so are the evaluations, every ``eval_every`` steps and
    at the last one. ``config.seed`` fixes the order of the examples; an epoch's last ``n_examples % batch_size`` are
    left out. Initial weights and torch's global generators are the caller's.

    Args:
        validate: called in evaluation mode and without gradients.
        patience: evaluations in a row without a new minimum that end the training.
        callback: called after each evaluation.

    Raises: ValueError for fewer examples than a batch holds, NonFiniteError if a loss is not finite.
    """
    check_integer("n_examples", n_examples, minimum=config.batch_size)
    check_integer("patience", patience)
    optimizer = make_optimizer(model, config)
    batches = _Batches(n_examples, config.batch_size, config.seed)
    model.train()
    curve: list[Evaluation] = []
    best, weights, losses = None, {}, []
    for step in range(config.steps):
        losses.append(_step(model, optimizer, config, step, loss, batches.next()))
        if (step + 1) % config.eval_every and step + 1 < config.steps:
            continue
        found = Evaluation(step + 1, math.fsum(losses) / len(losses), _validate(model, validate))
        curve.append(found)
        losses = []
        callback(found)
        if best is None or found.validation < best.validation:
            best, weights = found, copy.deepcopy(model.state_dict())
        elif len(curve) - 1 - curve.index(best) >= patience:
            break
    assert best is not None
    model.load_state_dict(weights)
    return Fit(curve[-1].step, best, curve)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    loss: LossFunction,
    batch: Int[Tensor, "n"],
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config) * group["lr_factor"]
    found = loss(batch)
    if not found.isfinite():
        raise NonFiniteError(f"step {step + 1}: the loss is {found.item()}")
    optimizer.zero_grad(set_to_none=True)
    found.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return found.item()


def _validate(model: nn.Module, validate: Callable[[], float]) -> float:
    with evaluation_mode(model):
        found = validate()
    if not math.isfinite(found):
        raise NonFiniteError(f"the validation loss is {found}")
    return found


class _Batches:
    """Indices of shuffled epochs, batch by batch."""

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self.n_examples, self.batch_size = n_examples, batch_size
        self.generator = torch.Generator().manual_seed(ORDER_SEED + seed)
        self.left: list[Tensor] = []

    def next(self) -> Int[Tensor, "n"]:
        if not self.left:
            order = torch.randperm(self.n_examples, generator=self.generator)
            whole = self.n_examples // self.batch_size * self.batch_size
            self.left = list(order[:whole].split(self.batch_size))[::-1]
        return self.left.pop()
