"""Checks of users' arguments: each ``ValueError`` names the argument, what came and what was wanted."""

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable

LARGEST = 2**64
"""No size, seed or count is larger, and torch's own messages about such a one name nothing."""


_BRIEF = reprlib.Repr()
"""A few aliases in a file make a value of a billion parts."""
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 300, 300
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = 12


def check(condition: bool, name: str, got: object, wanted: str) -> None:
    """``ValueError`` unless ``condition``; ``wanted`` completes "name must be ..."."""
    if not condition:
        shown = _BRIEF.repr(got) if isinstance(got, str | list | tuple | dict | set) else repr(got)
        raise ValueError(f"{name} must be {wanted}, got {shown}")


def check_integer(name: str, value: object, *, minimum: int = 1) -> None:
    """An int (not a bool) of at least ``minimum``."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    check(is_int and value >= minimum, name, value, f"an integer of at least {minimum}")  # type: ignore[operator]
    assert isinstance(value, int)
    check(value < LARGEST, name, f"one of {value.bit_length()} bits", "an integer below 2**64")


def check_positive(name: str, value: float) -> None:
    """A finite number above 0."""
    check(_is_finite(value) and value > 0, name, value, "a finite number above 0")


def check_non_negative(name: str, value: float) -> None:
    """A finite number of at least 0."""
    check(_is_finite(value) and value >= 0, name, value, "a finite number of at least 0")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # of an int that no float can hold
        return False


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


def check_choices(name: str, values: Iterable[object], choices: Collection[str]) -> None:
    """Each of ``values`` is one of ``choices``."""
    for value in values:
        check_choice(name, value, choices)


def check_keys(name: str, keys: Iterable[str], valid: Collection[str]) -> None:
    """No key is unknown; the first that is gets its nearest valid name suggested."""
    for key in keys:
        if key not in valid:
            hint = nearest(key, valid)
            raise ValueError(f"{name} has no key {key!r}{hint} (valid keys: {', '.join(sorted(valid))})")
