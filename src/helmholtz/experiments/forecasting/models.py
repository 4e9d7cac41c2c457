"""Forecasters of many series at once: encoders over variates or over time, a linear one and a naive one.

All map ``B L C``, the last L values of C variates, to ``B H C``, the next H.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.layers.init import init_normal
from helmholtz.models.encoder import Encoder, EncoderConfig

Axis = Literal["variates", "time"]
VARIANCE_EPS = 1e-5
"""Added to the variance of a look-back, in the units of the series squared."""
TREND_WIDTH = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecasterConfig(EncoderConfig):
    """Sizes of an encoder forecaster, and those of its encoder."""

    look_back: int = 96
    horizon: int
    axis: Axis
    """Along which its tokens lie: one token per variate, or per patch of time, each variate by itself."""
    patch: int = 16
    """Values per token of the axis "time"."""
    stride: int = 8
    """Values from one patch to the next; after the last value one stride of it is repeated."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        for name in ("look_back", "horizon", "patch", "stride"):
            check_integer(name, getattr(self, name))
        check_choice("axis", self.axis, get_args(Axis))
        check(self.patch <= self.look_back, "patch", self.patch, f"at most look_back = {self.look_back}")
        check(self.stride <= self.patch, "stride", self.stride, f"at most patch = {self.patch}")

    @property
    def n_patches(self) -> int:
        return (self.look_back + self.stride - self.patch) // self.stride + 1


class EncoderForecaster(nn.Module):
    r"""Tokens of normalised series through an encoder, and a linear map to the horizon.

    Each series is :math:`(x - m) / s` by mean and deviation of its own look-back, and its forecast is put back by the
    same two, so that shifted and scaled series have shifted and scaled forecasts (up to ``VARIANCE_EPS``).

    The variates of "variates" may be permuted, or be others than in training; those of "time" do not see each other.

    Source: Liu et al., "iTransformer", ICLR 2024 (variates); Nie et al., "PatchTST", ICLR 2023 (time); Kim et al.,
    "RevIN", ICLR 2022, without its learned scale.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = c = config
        over_variates = c.axis == "variates"
        self.embed = nn.Linear(c.look_back if over_variates else c.patch, c.d_model)
        self.encoder = Encoder(c, order="none" if over_variates else "rotary")
        self.head = nn.Linear(c.d_model * (1 if over_variates else c.n_patches), c.horizon)
        init_normal(self.embed)
        init_normal(self.head)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B H C"]:
        _check_length(x, self.config.look_back)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        scale = (variance + VARIANCE_EPS).sqrt()
        series = ((x - mean) / scale).transpose(1, 2)
        forecast = self.head(self._encode(series))
        return forecast.transpose(1, 2) * scale + mean

    def _encode(self, series: Float[Tensor, "B C L"]) -> Float[Tensor, "B C _"]:
        c = self.config
        if c.axis == "variates":
            return self.encoder(self.embed(series))
        padded = F.pad(series, (0, c.stride), mode="replicate")
        patches = padded.unfold(-1, c.patch, c.stride)
        encoded = self.encoder(self.embed(patches.flatten(0, 1)))
        return encoded.flatten(1).unflatten(0, series.shape[:2])


class DLinear(nn.Module):
    """Trend, a centred mean over 25 values with the ends repeated, and the rest, each by a linear map of its own.

    Both maps are shared by the variates; nothing is normalised.

    Source: Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023.
    """

    def __init__(self, look_back: int, horizon: int) -> None:
        super().__init__()
        check_integer("look_back", look_back)
        check_integer("horizon", horizon)
        self.trend = nn.Linear(look_back, horizon)
        self.rest = nn.Linear(look_back, horizon)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B H C"]:
        _check_length(x, self.trend.in_features)
        series = x.transpose(1, 2)
        margin = TREND_WIDTH // 2
        trend = F.avg_pool1d(F.pad(series, (margin, margin), mode="replicate"), TREND_WIDTH, stride=1)
        return (self.trend(trend) + self.rest(series - trend)).transpose(1, 2)


class SeasonalNaive(nn.Module):
    """The last ``period`` values over and over; it has no parameters."""

    def __init__(self, horizon: int, period: int = 24) -> None:
        super().__init__()
        check_integer("horizon", horizon)
        check_integer("period", period)
        self.horizon, self.period = horizon, period

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B H C"]:
        check(x.shape[1] >= self.period, "x", x.shape[1], f"at least one period of {self.period} values")
        steps = torch.arange(self.horizon, device=x.device) % self.period
        return x[:, x.shape[1] - self.period + steps]


def _check_length(x: Tensor, look_back: int) -> None:
    if x.shape[1] != look_back:
        raise ValueError(f"x: wanted look_back = {look_back} values of each variate, got {x.shape[1]}")
