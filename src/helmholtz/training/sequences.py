"""A loop over sequences that are drawn afresh in every step: for synthetic tasks, which have no text on disk."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn

from helmholtz.models.decoder import Decoder
from helmholtz.training.config import TrainConfig
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.objectives import Objective, ObjectiveFunction, next_token
from helmholtz.training.optim import NO_FACTORS, learning_rate, make_optimizer

DATA_SEED = 2_000_003
"""Added to the seed: weights and sequences come from different streams."""

SampleFunction = Callable[[int, torch.Generator], Int[Tensor, "B T1"]]
"""Of the number of sequences and the generator to draw them with."""
StepCallback = Callable[[int, Objective], None]
"""Called with the step, the first being 1, and its objective, after each optimizer step."""


def train_on_sequences(
    model: Decoder,
    sample: SampleFunction,
    config: TrainConfig,
    *,
    objective: ObjectiveFunction = next_token,
    lr_factors: Mapping[str, float] = NO_FACTORS,
    callback: StepCallback | None = None,
) -> None:
    """Train in fp32, ``config.batch_size`` fresh sequences per step; the model is left in training mode.

    ``config.seed`` fixes the sequences; initial weights and torch's global generators are the caller's. Nothing is
    evaluated or saved.

    Raises: NonFiniteError if the loss is not finite.
    """
    optimizer = make_optimizer(model, config, lr_factors)
    generator = torch.Generator().manual_seed(DATA_SEED + config.seed)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_factor"]
        found = objective(model, sample(config.batch_size, generator), step)
        if not found.loss.isfinite():
            raise NonFiniteError(f"step {step + 1}: the loss is {found.loss.item()}")
        optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if callback is not None:
            callback(step + 1, found)
