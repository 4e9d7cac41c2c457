"""Results of studies that are no queue."""

from pathlib import Path
from typing import Any

from helmholtz._checks import check
from helmholtz._json import parse_json


def read_content(file: Path, study: str) -> dict[str, Any]:
    """The result file of a study that is no queue. Raises: ValueError if it is not there, or damaged."""
    check(
        file.is_file(),
        "output",
        str(file.parent),
        f"a folder of results; helmholtz study {study} run makes them",
    )
    try:
        return dict(parse_json(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); run the study again") from error
