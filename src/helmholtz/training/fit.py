"""Training of small models on small tasks: a loop over any batches and loss, and one over examples with early stopping.

Nothing is saved or resumed; ``training.loop`` trains language models.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

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

Batch = TypeVar("Batch")
FitCallback = Callable[[int, float], bool | None]
"""Called after each step with its number, from 1, and its loss; True ends the training."""


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Float[Tensor, ""]],
    optimizer: torch.optim.Optimizer,
    *,
    lr: Callable[[int], float] | None = None,
    clip_norm: float = math.inf,
    skip_non_finite: bool = False,
    callback: FitCallback | None = None,
) -> int:
    """Make one optimizer step per batch; the model is left in training mode. Returns how many steps were left out.

    Args:
        lr: learning rate of a step, the first being 0, in place of the optimizer's; times a group's ``lr_factor``.
        clip_norm: largest norm of the gradient.
        skip_non_finite: leave out a step whose loss or gradient is not finite.

    Raises: NonFiniteError for such a step otherwise, before the weights are touched.
    """
    skipped = 0
    model.train()
    for step, batch in enumerate(batches):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(step) * group.get("lr_factor", 1.0)
        found = loss(batch)
        try:
            optimizer_step(model, optimizer, found, step=step + 1, clip_norm=clip_norm)
        except NonFiniteError:
            if not skip_non_finite:
                raise
            skipped += 1
        if callback is not None and callback(step + 1, found.item()):
            break
    return skipped


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Float[Tensor, ""],
    *,
    step: int,
    clip_norm: float = math.inf,
) -> Float[Tensor, ""]:
    """Backward pass, clipping, update. Returns: the gradient's norm before it was clipped.

    Raises: NonFiniteError naming ``step``, before the weights are touched, if loss or gradient are not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    _refuse_non_finite(step, "loss", loss)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    _refuse_non_finite(step, "gradient norm", norm)
    optimizer.step()
    return norm


def _refuse_non_finite(step: int, what: str, value: Tensor) -> None:
    if not value.isfinite():
        raise NonFiniteError(f"step {step}: the {what} is {value.item()}; try a lower learning rate")


def shuffled(
    n_items: int, batch_size: int, *, generator: torch.Generator, drop_last: bool = False
) -> Iterator[Int[Tensor, "_"]]:
    """Indices without end: all items in a random order, then all again in another.

    Args:
        drop_last: leave out the last ``n_items % batch_size`` of each order; else they are a smaller batch.
    """
    kept = n_items // batch_size * batch_size if drop_last else n_items
    while True:
        yield from torch.randperm(n_items, generator=generator)[:kept].split(batch_size)


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


def fit_examples(
    model: nn.Module,
    config: TrainConfig,
    n_examples: int,
    loss: Callable[[Int[Tensor, "n"]], Float[Tensor, ""]],
    validate: Callable[[], float],
    *,
    patience: int,
) -> Fit:
    """Minimise ``loss`` over shuffled epochs and keep the weights of the lowest ``validate()``.

    AdamW, warm-up, cosine and clipping are those of ``config``; so are the evaluations, every ``eval_every`` steps and
    at the last one. ``config.seed`` fixes the order of the examples; an epoch's last ``n_examples % batch_size`` are
    left out. Initial weights and torch's global generators are the caller's.

    Args:
        loss: of the indices of a batch's examples.
        validate: called in evaluation mode and without gradients.
        patience: evaluations in a row without a new minimum that end the training.

    Raises: ValueError for fewer examples than a batch holds, NonFiniteError if a loss is not finite.
    """
    check_integer("n_examples", n_examples, minimum=config.batch_size)
    check_integer("patience", patience)
    generator = torch.Generator().manual_seed(ORDER_SEED + config.seed)
    batches = shuffled(n_examples, config.batch_size, generator=generator, drop_last=True)
    curve, losses = list[Evaluation](), list[float]()
    weights: dict[str, Tensor] = {}

    def evaluate(step: int, value: float) -> bool:
        nonlocal weights
        losses.append(value)
        if step % config.eval_every and step < config.steps:
            return False
        curve.append(Evaluation(step, math.fsum(losses) / len(losses), _validate(model, validate)))
        losses.clear()
        best = _best(curve)
        if best is curve[-1]:
            weights = copy.deepcopy(model.state_dict())
        return len(curve) - 1 - curve.index(best) >= patience

    fit(
        model, itertools.islice(batches, config.steps), loss, make_optimizer(model, config),
        lr=partial(learning_rate, config=config), clip_norm=config.clip_norm, callback=evaluate,
    )  # fmt: skip
    model.load_state_dict(weights)
    return Fit(curve[-1].step, _best(curve), curve)


def _best(curve: list[Evaluation]) -> Evaluation:
    """The first of the lowest validation losses."""
    return min(curve, key=lambda point: point.validation)


def _validate(model: nn.Module, validate: Callable[[], float]) -> float:
    with evaluation_mode(model):
        found = validate()
    if not math.isfinite(found):
        raise NonFiniteError(f"the validation loss is {found}")
    return found
