"""JSON that is no file of ours: a ValueError, whatever its reader would have stumbled over."""

import pytest

from helmholtz._checks import check_fraction, check_integer, check_positive
from helmholtz._json import parse_json


def test_what_json_says_is_read():
    assert parse_json('{"a": [1, -2, 1.5e3, null, true, "x"]}') == {"a": [1, -2, 1500.0, None, True, "x"]}
    assert parse_json(str(2**64 - 1)) == 2**64 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too deeply nested"),
        ('{"a":' * 100_000, "too deeply nested"),
        ("1" + "0" * 30, "an integer of 31 digits"),
        ("-" + "9" * 10_000, "an integer of 10000 digits"),
        (str(2**64), "an integer of 20 digits"),
        ("{", "Expecting property name"),
        (b"\xff\xfe", "."),
    ],
)
def test_what_is_no_file_of_ours_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize("value", [10**30, -(10**30), 10**400])
def test_numbers_beyond_every_size_are_refused(value):
    for check in (check_integer, check_positive, check_fraction):
        if (check, value) == (check_positive, 10**30):
            continue  # a large temperature is one
        with pytest.raises(ValueError, match="x must be"):
            check("x", value)
