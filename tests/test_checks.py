"""The messages of the checks name the argument, what came and what was wanted."""

import pytest

from helmholtz import _checks


@pytest.mark.parametrize("good", [1, 7])
def test_good_arguments_pass(good):
    _checks.check_integer("n", good)
    _checks.check_positive("x", good / 3)
    _checks.check_non_negative("x", good - 1)
    _checks.check_fraction("x", 1 - 1 / good)
    _checks.check_fraction("x", 1.0, below_one=False)
    _checks.check_divides("n_heads", good, "d_model", 14)
    _checks.check_choice("x", "a", ("a", "b"))
    _checks.check_keys("config", ["a"], ("a", "b"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _checks.check_integer("n", 0), "n must be an integer of at least 1, got 0"),
        (lambda: _checks.check_integer("n", True), "n must be an integer of at least 1, got True"),
        (lambda: _checks.check_integer("n", 2.0), "n must be an integer of at least 1, got 2.0"),
        (lambda: _checks.check_positive("x", 0.0), "x must be a finite number above 0, got 0.0"),
        (lambda: _checks.check_positive("x", float("nan")), "x must be a finite number above 0, got nan"),
        (lambda: _checks.check_positive("x", float("inf")), "x must be a finite number above 0, got inf"),
        (lambda: _checks.check_non_negative("x", -1), "x must be a finite number of at least 0, got -1"),
        (lambda: _checks.check_fraction("x", 1.0), "x must be in [0, 1), got 1.0"),
        (lambda: _checks.check_fraction("x", 1.5, below_one=False), "x must be in [0, 1], got 1.5"),
        (
            lambda: _checks.check_divides("n_heads", 3, "d_model", 8),
            "n_heads must divide d_model, got n_heads=3 and d_model=8",
        ),
        (
            lambda: _checks.check_choice("prior", "softmx", ("linear", "softmax")),
            "prior must be one of ['linear', 'softmax'], got 'softmx'; did you mean 'softmax'?",
        ),
        (
            lambda: _checks.check_keys("model", ["d_modell"], ("d_model", "n_heads")),
            "model has no key 'd_modell'; did you mean 'd_model'? (valid keys: d_model, n_heads)",
        ),
        (
            lambda: _checks.check_keys("model", ["xyz"], ("d_model",)),
            "model has no key 'xyz' (valid keys: d_model)",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_a_value_that_is_a_bomb_is_shown_in_brief():
    bomb = ["x"] * 10
    for _ in range(20):
        bomb = [bomb] * 10
    for value in (bomb, {"a": bomb}, "x" * 10**6):
        with pytest.raises(ValueError, match="name must be small") as caught:
            _checks.check(False, "name", value, "small")
        assert len(str(caught.value)) < 3_000
