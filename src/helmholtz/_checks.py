"""Checks of users' arguments: each ``ValueError`` names the argument, what came and what was wanted."""

import difflib
import math
from collections.abc import Collection, Iterable


def check(condition: bool, name: str, got: object, wanted: str) -> None:
    """``ValueError`` unless ``condition``; ``wanted`` completes "name must be ..."."""
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def check_integer(name: str, value: object, *, minimum: int = 1) -> None:
    """An int (not a bool) of at least ``minimum``."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    check(is_int and value >= minimum, name, value, f"an integer of at least {minimum}")  # type: ignore[operator]


def check_positive(name: str, value: float) -> None:
    """A finite number above 0."""
    check(math.isfinite(value) and value > 0, name, value, "a finite number above 0")


def check_non_negative(name: str, value: float) -> None:
    """A finite number of at least 0."""
    check(math.isfinite(value) and value >= 0, name, value, "a finite number of at least 0")


def check_fraction(name: str, value: float, *, below_one: bool = True) -> None:
    """A number in ``[0, 1)``, or in ``[0, 1]`` if ``below_one`` is false."""
    inside = 0 <= value < 1 if below_one else 0 <= value <= 1
    check(inside, name, value, "in [0, 1)" if below_one else "in [0, 1]")


def check_divides(name: str, divisor: int, of: str, number: int) -> None:
    """``divisor`` (the argument ``name``) divides ``number`` (the argument ``of``)."""
    check_integer(name, divisor)
    if number % divisor:
        raise ValueError(f"{name} must divide {of}, got {name}={divisor} and {of}={number}")


def nearest(name: object, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid name closest to ``name``, or nothing if none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """``value`` is one of ``choices``; otherwise the nearest one is suggested."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}{nearest(value, choices)}")


def check_keys(name: str, keys: Iterable[str], valid: Collection[str]) -> None:
    """No key is unknown; the first that is gets its nearest valid name suggested."""
    for key in keys:
        if key not in valid:
            hint = nearest(key, valid)
            raise ValueError(f"{name} has no key {key!r}{hint} (valid keys: {', '.join(sorted(valid))})")
