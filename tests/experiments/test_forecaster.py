"""Forecasters keep the symmetries that they are built for, and the baselines their formulas."""

import pytest
import torch

from fem_cases import stir
from helmholtz.experiments.forecasting import models as forecaster
from helmholtz.experiments.forecasting.models import (
    DLinear,
    EncoderForecaster,
    ForecasterConfig,
    SeasonalNaive,
)

LOOK_BACK, HORIZON = 32, 12
KINDS = [(axis, mixer) for axis in ("variates", "time") for mixer in ("attention", "fem")]


def make(axis, mixer):
    config = ForecasterConfig(
        look_back=LOOK_BACK, horizon=HORIZON, axis=axis, mixer=mixer, patch=8, stride=4, d_model=16,
        n_layers=2, n_heads=2, d_ff=64,
    )  # fmt: skip
    return stir(EncoderForecaster(config).double().eval(), scale=0.2)


def series(batch=3, variates=5):
    return torch.randn(batch, LOOK_BACK, variates, dtype=torch.float64).cumsum(1)


@pytest.mark.parametrize(("axis", "mixer"), KINDS)
def test_forecasts_are_permuted_as_the_variates_are(axis, mixer):
    model, x = make(axis, mixer), series()
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model(x[..., order]), model(x)[..., order])
    assert model(x).shape == (3, HORIZON, 5)


@pytest.mark.parametrize(("axis", "mixer"), KINDS)
def test_variates_see_each_other_over_variates_and_never_over_time(axis, mixer):
    model, x = make(axis, mixer), series()
    changed = x.clone()
    changed[..., 2] = torch.randn(3, LOOK_BACK)
    difference = (model(changed) - model(x)).abs().amax((0, 1))
    others = difference[[0, 1, 3, 4]]
    assert difference[2] > 1e-3
    assert (others > 1e-6).all() if axis == "variates" else (others == 0).all()


@pytest.mark.parametrize(("axis", "mixer"), KINDS)
def test_shifted_and_scaled_series_have_shifted_and_scaled_forecasts(axis, mixer, monkeypatch):
    monkeypatch.setattr(forecaster, "VARIANCE_EPS", 0.0)
    model, x = make(axis, mixer), series()
    scale, shift = torch.tensor([2.0, 0.1, 30.0, 1.0, 5.0]).double(), torch.arange(5.0).double() * 100
    torch.testing.assert_close(model(x * scale + shift), model(x) * scale + shift)
    assert not torch.allclose(model(-x), -model(x)), "it is no linear map"


@pytest.mark.parametrize(("axis", "mixer"), KINDS)
def test_a_look_back_that_stands_still_has_a_finite_forecast(axis, mixer):
    model, x = make(axis, mixer), series()
    x[..., 1] = 7
    assert model(x).isfinite().all()
    assert (model(x)[..., 1] - 7).abs().max() < 0.1


@pytest.mark.parametrize("mixer", ["attention", "fem"])
def test_every_value_of_the_look_back_matters(mixer):
    for axis in ("variates", "time"):
        model, x = make(axis, mixer), series(batch=1, variates=1).requires_grad_()
        weights = torch.randn(HORIZON, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((model(x)[0, :, 0] * weights).sum(), x)
        assert (gradient.abs() > 1e-9).all(), axis


def test_patches_overlap_by_stride_and_the_last_stride_repeats():
    config = ForecasterConfig(horizon=3, axis="time", mixer="attention", patch=16, stride=8)
    assert config.n_patches == 12
    model = make("time", "attention")
    taken = []
    model.embed.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    x = series(batch=1, variates=1)
    model(x)
    z = (x - x.mean()) / x.var(correction=0).add(1e-5).sqrt()
    padded = torch.cat([z[0, :, 0], z[0, -1:, 0].expand(4)])
    expected = torch.stack([padded[i : i + 8] for i in range(0, len(padded) - 7, 4)])
    torch.testing.assert_close(taken[0], expected.unsqueeze(0))
    assert len(expected) == model.config.n_patches


def test_dlinear_is_its_formula():
    model = DLinear(LOOK_BACK, HORIZON).double()
    x = series(batch=2, variates=3)
    expected = torch.empty(2, HORIZON, 3, dtype=torch.float64)
    for b in range(2):
        for c in range(3):
            values = x[b, :, c]
            trend = torch.stack(
                [
                    torch.stack([values[min(max(t + d, 0), LOOK_BACK - 1)] for d in range(-12, 13)]).mean()
                    for t in range(LOOK_BACK)
                ]
            )
            expected[b, :, c] = model.trend.weight @ trend + model.trend.bias
            expected[b, :, c] += model.rest.weight @ (values - trend) + model.rest.bias
    torch.testing.assert_close(model(x), expected)


def test_the_seasonal_naive_forecast_is_exact_on_what_repeats():
    word = torch.randn(2, 24, 3)
    repeated = word.repeat(1, 9, 1)
    for horizon in (5, 24, 100):
        model = SeasonalNaive(horizon)
        for begin in (0, 7):
            x, y = repeated[:, begin : begin + 96], repeated[:, begin + 96 : begin + 96 + horizon]
            assert torch.equal(model(x), y)
    assert torch.equal(SeasonalNaive(3, period=1)(word), word[:, -1:].expand(2, 3, 3))
    with pytest.raises(ValueError, match="x must be at least one period of 24 values, got 23"):
        SeasonalNaive(5)(word[:, 1:])


@pytest.mark.parametrize(
    "make_model", [lambda: make("variates", "fem"), lambda: DLinear(LOOK_BACK, 3).double()]
)
def test_another_look_back_is_refused(make_model):
    with pytest.raises(ValueError, match="x: wanted look_back = 32 values of each variate, got 31"):
        make_model()(series()[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 97}, "patch must be at most look_back = 96, got 97"),
        ({"stride": 17}, "stride must be at most patch = 16, got 17"),
        ({"horizon": 0}, "horizon must be an integer of at least 1, got 0"),
        ({"d_model": 30}, "n_heads must divide d_model"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForecasterConfig(**{"horizon": 5, "axis": "time", "mixer": "fem"} | options)
