"""Parts of a series in the order of time, standardised on the first, and the windows that forecasts are made in."""

from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.experiments.forecasting.data import Series

MONTH = timedelta(days=30)
MONTHS = (12, 4, 4)
PERCENT = (60, 20, 20)
MIN_WINDOWS = 100
"""Validation windows below which early stopping would be a lottery."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Rows of the three parts, one after the other: training from 0, validation, test up to ``end``."""

    validation: int
    test: int
    end: int


def split_bounds(series: Series) -> Bounds:
    """The usual protocol of ETT, 12, 4 and 4 months of 30 days, and 60, 20 and 20 % of a series that is shorter.

    Hourly, the former are 8,640, 2,880 and 2,880 rows; what comes after is not used.
    """
    month = MONTH // series.step
    if len(series.values) >= sum(MONTHS) * month > 0:
        train, validation, test = (n * month for n in MONTHS)
        return Bounds(train, train + validation, train + validation + test)
    train, validation = (len(series.values) * share // 100 for share in PERCENT[:2])
    return Bounds(train, train + validation, len(series.values))


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Every window of ``look_back`` inputs and ``horizon`` targets whose targets lie in one part of a series."""

    values: Float[Tensor, "T C"]
    """The rows of the part, with ``look_back`` rows before them."""
    look_back: int
    horizon: int

    def __len__(self) -> int:
        return max(0, len(self.values) - self.look_back - self.horizon + 1)

    def read(self, indices: Int[Tensor, "B"]) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B H C"]]:
        """Inputs and targets of these windows; window ``i`` begins ``i`` rows after the first."""
        frames = self.values.unfold(0, self.look_back + self.horizon, 1)[indices].transpose(1, 2)
        return frames[:, : self.look_back], frames[:, self.look_back :]


@dataclass(frozen=True, slots=True, eq=False)
class ForecastData:
    """A standardised series in windows: to train on, to stop by and to report."""

    train: Windows
    validation: Windows
    test: Windows
    mean: Float[Tensor, "C"]
    """Of the training rows, in the units of the source."""
    scale: Float[Tensor, "C"]
    """Deviation of the training rows."""


def forecast_data(series: Series, *, look_back: int, horizon: int) -> ForecastData:
    """The windows of a series, standardised by mean and deviation of its training rows.

    Inputs of the first validation and test windows reach back into the part before; targets never do. The training
    windows lie within the training rows. All is in float32.

    Raises: ValueError if fewer than ``MIN_WINDOWS`` windows are left to validate or test, or if a variate does not vary
        in the training rows.
    """
    check_integer("look_back", look_back)
    check_integer("horizon", horizon)
    bounds = split_bounds(series)
    rows = series.values[: bounds.validation]
    scale, mean = torch.std_mean(rows, dim=0, correction=0)
    still = [name for name, s in zip(series.variates, scale.tolist(), strict=True) if s == 0]
    check(not still, "variates", still, "such that they vary in the training rows")
    values = ((series.values - mean) / scale).float()
    begins = (look_back, bounds.validation, bounds.test)
    parts = [
        Windows(values[begin - look_back : end], look_back, horizon)
        for begin, end in zip(begins, (bounds.validation, bounds.test, bounds.end), strict=True)
    ]
    for name, windows in zip(("training", "validation", "test"), parts, strict=True):
        check(
            len(windows) >= MIN_WINDOWS,
            "horizon",
            horizon,
            f"one that leaves {MIN_WINDOWS} {name} windows of {series.name} ({len(windows)} are left)",
        )
    train, validation, test = parts
    return ForecastData(train, validation, test, mean, scale)
