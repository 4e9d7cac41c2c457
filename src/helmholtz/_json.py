"""JSON of files that anybody may have written."""

import json
from typing import Any

from helmholtz._checks import LARGEST


def parse_json(text: str | bytes) -> Any:
    """The values in ``text``. Raises: ValueError if it is not JSON, too deeply nested, or has a larger integer."""
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _integer(digits: str) -> int:
    if len(digits) > len(str(LARGEST)) or abs(int(digits)) >= LARGEST:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)
