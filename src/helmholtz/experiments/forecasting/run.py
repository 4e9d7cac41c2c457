"""Forecasting many variates at once: encoders of attention and of FEM, over variates and over time, and two baselines.

Look-back 96, horizons 96 to 720, errors of the standardised series over all test windows: the usual protocol of ETT.
Learning rates come from a pilot on the validation windows of the traffic, which sees no test window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_choices, check_integer
from helmholtz.experiments.forecasting.data import Series
from helmholtz.experiments.forecasting.models import (
    DLinear,
    EncoderForecaster,
    ForecasterConfig,
    SeasonalNaive,
)
from helmholtz.experiments.forecasting.windows import ForecastData, Windows, forecast_data
from helmholtz.experiments.queue import QueuedRun
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.base import evaluation_mode
from helmholtz.training.config import TrainConfig
from helmholtz.training.fit import fit_examples
from helmholtz.training.loop import seed_everything

LOOK_BACK = 96
HORIZONS = (96, 192, 336, 720)
VALIDATION_STRIDE = 4
"""Every fourth validation window is looked at in training: windows overlap, and looking costs as much as learning."""
BATCH_SIZE = 64
"""Windows that are evaluated at once."""
SHOWN_WINDOWS, SHOWN_STEPS = 3, 96
"""Test windows, evenly spread, and steps of them that a result keeps for the picture."""
DAY = timedelta(days=1)

Measured = Literal["validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained; FEM is trained as attention is but for its learning rate."""

    lr: float
    steps: int = 600
    batch_size: int = 32
    """Windows; over time each of them is a series per variate, and fewer are enough."""
    eval_every: int = 75
    patience: int = 3
    """Evaluations without a better validation error that end the training."""
    warmup_steps: int = 20
    weight_decay: float = 0.01

    def train_config(self, seed: int) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, seq_len=LOOK_BACK, lr=self.lr,
            warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, eval_every=self.eval_every,
            seed=seed,
        )  # fmt: skip


RECIPES: dict[str, Recipe | None] = {
    "attention-variates": Recipe(lr=3e-3),
    "fem-variates": Recipe(lr=3e-3),
    "attention-time": Recipe(lr=3e-3, batch_size=8),
    "fem-time": Recipe(lr=1e-2, batch_size=8),
    "dlinear": Recipe(lr=1e-3, steps=2000, eval_every=250),
    "naive": None,
}
"""By the model's name; the last day over and over has nothing to learn."""


def build_forecaster(model: str, horizon: int, step: timedelta) -> nn.Module:
    """The model of this name, initialised by torch's generator. Raises: ValueError for an unknown name."""
    check_choice("models", model, RECIPES)
    if model == "naive":
        return SeasonalNaive(horizon, max(1, DAY // step))
    if model == "dlinear":
        return DLinear(LOOK_BACK, horizon)
    return EncoderForecaster(_config(model, horizon))


def _config(model: str, horizon: int) -> ForecasterConfig:
    mixer, axis = model.split("-")
    return ForecasterConfig(look_back=LOOK_BACK, horizon=horizon, axis=axis, mixer=mixer)  # type: ignore[arg-type]


def forecast_runs(
    series: Sequence[Series],
    models: Sequence[str],
    horizons: Sequence[int],
    seeds: Sequence[int],
    *,
    measured: Measured = "test",
    lrs: Sequence[float | None] = (None,),
) -> list[QueuedRun]:
    """The queue: every model, horizon and seed on every series.

    Args:
        measured: "validation" leaves the test windows alone.
        lrs: in place of the recipe's learning rate, for a pilot; None is the recipe's.

    Raises: ValueError for unknown models, sizes that do not fit, or series of one name.
    """
    check_choice("measured", measured, get_args(Measured))
    names = [s.name for s in series]
    check(len(set(names)) == len(names), "data", names, "series whose names differ")
    check_choices("models", models, RECIPES)
    for horizon in horizons:
        check_integer("horizons", horizon)
    return [
        _run(one, model, horizon, seed, measured, lr)
        for one in series
        for seed in seeds
        for horizon in horizons
        for model in models
        for lr in lrs
    ]


def _run(one: Series, model: str, horizon: int, seed: int, measured: Measured, lr: float | None) -> QueuedRun:
    recipe = RECIPES[model]
    training = None if recipe is None else asdict(recipe)
    name = f"{one.name}-{model}-{horizon}-{seed}"
    if lr is not None:
        check(training is not None, "models", model, "models that are trained, in a pilot of learning rates")
        assert training is not None
        training["lr"] = lr
        name += f"-lr{lr:g}"
    encoder = model not in ("naive", "dlinear")
    settings = {
        "data": {
            "name": one.name,
            "sha256": one.sha256,
            "rows": len(one.values),
            "variates": list(one.variates),
            "filled": one.n_filled,
        },
        "model": model,
        "look_back": LOOK_BACK,
        "horizon": horizon,
        "seed": seed,
        "measured": measured,
        "sizes": asdict(_config(model, horizon)) if encoder else None,
        "training": training,
    }
    return QueuedRun(name, settings)


def compute_forecast(run: QueuedRun, series: Mapping[str, Series]) -> dict[str, Any]:
    """Train the model of a run, unless it has nothing to learn, and measure it.

    Returns: parameters, the learning curve, errors on the validation windows that training looked at and, where they
        are measured, on all test windows; of some of those the first steps of the forecast of the shown variate.
    """
    settings = run.settings
    one, horizon, seed = series[settings["data"]["name"]], settings["horizon"], settings["seed"]
    data = forecast_data(one, look_back=LOOK_BACK, horizon=horizon)
    seed_everything(seed)
    model = build_forecaster(settings["model"], horizon, one.step)
    result: dict[str, Any] = {"parameters": count_parameters(model), "curve": []}
    if settings["training"] is not None:
        result |= _train(model, data, Recipe(**settings["training"]), seed)
    result["validation"] = errors(model, data.validation, stride=VALIDATION_STRIDE)
    if settings["measured"] == "test":
        result["test"] = errors(model, data.test)
        result["forecasts"] = _shown(model, data.test, one.variates.index(one.shown))
    return result


def _train(model: nn.Module, data: ForecastData, recipe: Recipe, seed: int) -> dict[str, Any]:
    def loss(batch: Tensor) -> Tensor:
        inputs, targets = data.train.read(batch)
        return (model(inputs) - targets).square().mean()

    found = fit_examples(
        model, recipe.train_config(seed), len(data.train), loss,
        lambda: errors(model, data.validation, stride=VALIDATION_STRIDE)["mse"], patience=recipe.patience,
    )  # fmt: skip
    curve = [[point.step, point.train, point.validation] for point in found.curve]
    return {"steps": found.steps, "best_step": found.best.step, "curve": curve}


def errors(model: nn.Module, windows: Windows, *, stride: int = 1) -> dict[str, float | int]:
    """Mean squared and mean absolute error over every ``stride``-th window, all steps and variates alike."""
    chosen = torch.arange(0, len(windows), stride)
    squared, absolute, count = 0.0, 0.0, 0
    with evaluation_mode(model):
        for batch in chosen.split(BATCH_SIZE):
            inputs, targets = windows.read(batch)
            difference = (model(inputs) - targets).double()
            squared += difference.square().sum().item()
            absolute += difference.abs().sum().item()
            count += difference.numel()
    return {"mse": squared / count, "mae": absolute / count, "windows": len(chosen)}


def shown_windows(n_windows: int) -> Tensor:
    """Indices of the windows that figures show."""
    return torch.linspace(0, n_windows - 1, SHOWN_WINDOWS + 2).long()[1:-1]


def _shown(model: nn.Module, windows: Windows, variate: int) -> list[list[float]]:
    inputs, _ = windows.read(shown_windows(len(windows)))
    with evaluation_mode(model):
        forecasts: Float[Tensor, "n H"] = model(inputs)[:, :SHOWN_STEPS, variate]
    return [[round(value, 3) for value in row] for row in forecasts.tolist()]
