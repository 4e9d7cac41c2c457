"""Parts of a series keep to the order of time, statistics come from the first, and no window sees what it must not."""

from datetime import timedelta

import pytest
import torch

from helmholtz.experiments.forecasting.data import Series
from helmholtz.experiments.forecasting.windows import Bounds, Windows, forecast_data, split_bounds
from series_cases import waves

LOOK_BACK, HORIZON = 24, 12


def sized(n_rows, step):
    values = torch.arange(n_rows, dtype=torch.float64).unsqueeze(1)
    return Series("x", waves(2).start, step, ("a",), "a", values)


def test_long_series_are_split_as_ett_is_and_short_ones_by_percent():
    assert split_bounds(sized(17420, timedelta(hours=1))) == Bounds(8640, 11520, 14400)
    assert split_bounds(sized(14400, timedelta(hours=1))) == Bounds(8640, 11520, 14400)
    assert split_bounds(sized(69680, timedelta(minutes=15))) == Bounds(34560, 46080, 57600)
    assert split_bounds(sized(14399, timedelta(hours=1))) == Bounds(8639, 11518, 14399)
    assert split_bounds(sized(8730, timedelta(hours=1))) == Bounds(5238, 6984, 8730)
    assert split_bounds(sized(1000, timedelta(days=40))) == Bounds(600, 800, 1000)


def test_windows_are_rows_in_order():
    windows = Windows(torch.arange(20.0).unsqueeze(1), 5, 3)
    assert len(windows) == 13
    inputs, targets = windows.read(torch.tensor([12, 0]))
    assert inputs[..., 0].tolist() == [[12, 13, 14, 15, 16], [0, 1, 2, 3, 4]]
    assert targets[..., 0].tolist() == [[17, 18, 19], [5, 6, 7]]


def test_statistics_are_those_of_the_training_rows_alone():
    series = waves(1000)
    data = forecast_data(series, look_back=LOOK_BACK, horizon=HORIZON)
    training = data.train.values.double()
    assert len(training) == 600
    assert training.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(training.std(0, correction=0), torch.ones(3, dtype=torch.float64))
    changed = series.values.clone()
    changed[600:] = changed[600:] * 7 + 100
    other = forecast_data(
        Series("x", series.start, series.step, series.variates, "v0", changed),
        look_back=LOOK_BACK,
        horizon=HORIZON,
    )
    assert torch.equal(other.mean, data.mean) and torch.equal(other.scale, data.scale)
    assert torch.equal(other.train.values, data.train.values)
    assert not torch.equal(other.validation.values, data.validation.values)


def test_targets_of_the_parts_are_disjoint_and_cover_all_rows():
    """Rows are told by their values, which are their numbers."""
    series = sized(1000, timedelta(hours=1))
    data = forecast_data(series, look_back=LOOK_BACK, horizon=HORIZON)

    def rows(windows, part):
        both = windows.read(torch.arange(len(windows)))
        numbers = both[part].double() * data.scale + data.mean
        return {round(x) for x in numbers.flatten().tolist()}

    parts = (data.train, data.validation, data.test)
    targets = [rows(windows, 1) for windows in parts]
    assert targets == [set(range(LOOK_BACK, 600)), set(range(600, 800)), set(range(800, 1000))]
    inputs = [rows(windows, 0) for windows in parts]
    assert max(inputs[0]) < 600, "training sees the training part alone"
    assert min(inputs[2]) == 800 - LOOK_BACK, "test windows reach back into the validation part, no further"
    assert min(inputs[1]) == 600 - LOOK_BACK


def test_windows_that_are_too_few_and_variates_that_stand_still_are_refused():
    series = waves(1000)
    with pytest.raises(
        ValueError, match=r"horizon must be .* 100 validation windows of waves \(99 are left\)"
    ):
        forecast_data(series, look_back=LOOK_BACK, horizon=102)
    assert len(forecast_data(series, look_back=LOOK_BACK, horizon=101).validation) == 100
    with pytest.raises(ValueError, match=r"100 training windows of waves \(0 are left\)"):
        forecast_data(series, look_back=700, horizon=12)
    still = series.values.clone()
    still[:600, 1] = 4
    with pytest.raises(ValueError, match=r"variates must be such that they vary .*, got \['v1'\]"):
        forecast_data(
            Series("x", series.start, series.step, series.variates, "v0", still), look_back=24, horizon=12
        )
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, got 0"):
        forecast_data(series, look_back=24, horizon=0)
