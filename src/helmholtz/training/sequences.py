"""Training on sequences that are drawn afresh in every step: for synthetic tasks, which have no text on disk."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.models.decoder import Decoder
from helmholtz.training.config import TrainConfig
from helmholtz.training.fit import FitCallback, fit
from helmholtz.training.objectives import ObjectiveFunction, next_token
from helmholtz.training.optim import NO_FACTORS, learning_rate, make_optimizer

DATA_SEED = 2_000_003
"""Added to the seed: weights and sequences come from different streams."""

SampleFunction = Callable[[int, torch.Generator], Int[Tensor, "B T1"]]
"""Of the number of sequences and the generator to draw them with."""


def train_on_sequences(
    model: Decoder,
    sample: SampleFunction,
    config: TrainConfig,
    *,
    objective: ObjectiveFunction = next_token,
    lr_factors: Mapping[str, float] = NO_FACTORS,
    callback: FitCallback | None = None,
) -> None:
    """Train in fp32, ``config.batch_size`` fresh sequences per step; the model is left in training mode.

    ``config.seed`` fixes the sequences; initial weights and torch's global generators are the caller's. Nothing is
    evaluated or saved.

    Raises: NonFiniteError if a loss or its gradient is not finite.
    """
    generator = torch.Generator().manual_seed(DATA_SEED + config.seed)

    def loss(step: int) -> Float[Tensor, ""]:
        return objective(model, sample(config.batch_size, generator), step).loss

    fit(
        model, range(config.steps), loss, make_optimizer(model, config, lr_factors),
        lr=partial(learning_rate, config=config), clip_norm=config.clip_norm, callback=callback,
    )  # fmt: skip
