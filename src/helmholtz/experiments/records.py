"""Finished runs on disk: a file each while their queue works, a line each of ``runs.jsonl`` once they are folded.

A line is a JSON object: the run's ``name``, its ``settings``, its ``result``, and its ``timing`` (seconds, date, commit
and hardware; empty if it was lost). The files are ``results/<name>.json`` with settings and result,
``timings/<name>.json`` and, where a study measures more times, ``timings/<name>.<part>.json``, which is
``timing[part]`` in the line.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helmholtz._files import write_atomically
from helmholtz._json import parse_json
from helmholtz._locks import LockedError, locked

RUNS = "runs.jsonl"
RESULTS, TIMINGS, LOCKS = "results", "timings", ".locks"
PARTS = ("curve",)
"""Times that a study measures beside those of the queue: of the language study at the points of its curve."""

Record = dict[str, Any]


def read_record(folder: Path, name: str) -> Record | None:
    """The run of this name, None if it is not there.

    Raises: ValueError if it is damaged, or there twice with different results.
    """
    own = _read_own(folder, name)  # before the lines: ``fold`` writes a line before it removes the files
    line = read_lines(folder / RUNS).get(name)
    if own is None or line is None:
        return own or line
    if any(own[key] != line[key] for key in ("settings", "result")):
        raise ValueError(
            f"{folder}: {RESULTS}/{name}.json differs from the run of that name in {RUNS}; remove one of them"
        )
    return line  # the timing may have been removed already


def _read_own(folder: Path, name: str) -> Record | None:
    file = folder / RESULTS / f"{name}.json"
    try:
        content = parse_json(file.read_text())
        record = {"name": name, "settings": dict(content["settings"]), "result": dict(content["result"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged result ({error!r}); delete it to compute it again") from error
    timing = _read_timing(folder, name)
    for part in PARTS:
        if times := _read_timing(folder, f"{name}.{part}"):
            timing[part] = times
    return record | {"timing": timing}


def _read_timing(folder: Path, name: str) -> dict[str, Any]:
    file = folder / TIMINGS / f"{name}.json"
    try:
        return dict(parse_json(file.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}: damaged ({error}); delete it: only how long the run took is lost"
        ) from error


def read_lines(file: Path) -> Mapping[str, Record]:
    """The folded runs by their names; empty if there is no file. Raises: ValueError naming a damaged line."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return {}
    return _read_lines(file, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=8)
def _read_lines(file: Path, state: tuple[int, int, int]) -> Mapping[str, Record]:
    """Once per state of the file: a queue looks for each of its runs."""
    records: dict[str, Record] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            content = parse_json(line)
            name = str(content["name"])
            record = {"name": name} | {key: dict(content[key]) for key in ("settings", "result", "timing")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: damaged ({error!r}); delete the line to compute its run again"
            ) from error
        if records.setdefault(name, record) != record:
            raise ValueError(
                f"{file}, line {number}: another result of {name} above; delete one of the lines"
            )
    return records


def fold(folder: Path) -> int:
    """Move every finished run that has files of its own into ``runs.jsonl``; returns how many.

    The new ``runs.jsonl`` is on disk before a file is removed, so that at every moment each run is in one of the two. A
    process that folds the same folder at the same time is left to it.

    Raises: ValueError as ``read_record`` does; nothing is changed then.
    """
    if not any((folder / RESULTS).glob("*.json")):
        return 0
    (folder / LOCKS).mkdir(exist_ok=True)
    try:
        with locked(folder / LOCKS / RUNS):
            return _fold(folder)
    except LockedError:
        return 0


def _fold(folder: Path) -> int:
    names = sorted(file.stem for file in (folder / RESULTS).glob("*.json"))
    found = {name: record for name in names if (record := read_record(folder, name)) is not None}
    records = {**read_lines(folder / RUNS), **found}
    lines = [json.dumps(records[name], allow_nan=False) + "\n" for name in sorted(records)]
    write_atomically(folder / RUNS, "".join(lines))
    for name in found:
        for file in (name, *(f"{name}.{part}" for part in PARTS)):
            (folder / TIMINGS / f"{file}.json").unlink(missing_ok=True)
        (folder / RESULTS / f"{name}.json").unlink(
            missing_ok=True
        )  # last: by it the next call finds what is left
    return len(found)
