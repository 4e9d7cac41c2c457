"""A solver's settings are checked when they are made."""

from dataclasses import FrozenInstanceError

import pytest

from helmholtz.solvers import Implicit, Phantom, SolverConfig, Unrolled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rtol": 0.0}, "rtol must be a finite number above 0, got 0.0"),
        ({"energy_rtol": -1e-3}, "energy_rtol must be a finite number above 0"),
        ({"rtol": float("nan")}, "rtol must be"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"anderson_window": 0}, "anderson_window must be an integer"),
        ({"newton_cg_steps": 0}, "newton_cg_steps must be an integer"),
        ({"damping": 0.0}, "damping must be between 0 and 2, both excluded, got 0.0"),
        ({"damping": 2.0}, "damping must be between 0 and 2"),
        ({"damping": float("nan")}, "damping must be between 0 and 2"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SolverConfig(**settings)


def test_the_nearest_mode_is_suggested():
    # the shape checks stop an unknown literal before the library's own message does
    check = SolverConfig.__post_init__
    config = SolverConfig()
    for field, wrong, right in [
        ("mode", "alternate", "alternating"),
        ("on_nonconvergence", "warning", "warn"),
    ]:
        broken = object.__new__(SolverConfig)
        for name in SolverConfig.__dataclass_fields__:
            object.__setattr__(broken, name, getattr(config, name))
        object.__setattr__(broken, field, wrong)
        with pytest.raises(ValueError, match=f"{field} must be one of .*; did you mean '{right}'"):
            check(broken)


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        SolverConfig().max_steps = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Implicit(rtol=0.0), "rtol must be"),
        (lambda: Implicit(max_steps=0), "max_steps must be"),
        (lambda: Phantom(n_steps=0), "n_steps must be"),
        (lambda: Unrolled(n_steps=0), "n_steps must be"),
    ],
    ids=["rtol", "max_steps", "phantom", "unrolled"],
)
def test_an_adjoint_checks_its_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
