"""Two processes raise a run's steps, continue it elsewhere and begin with its weights, as one process does."""

import json

import pytest

from distributed_cases import STRATEGIES, TOLERANCE, assert_equal_runs, distributed_run, records, run_cases
from helmholtz.training.run import train
from tiny_runs import prepare_text

pytestmark = pytest.mark.slow
EVERY = pytest.mark.parametrize("strategy", STRATEGIES)
CONSTANT = {"min_lr_ratio": 1.0, "eval_every": 3, "save_every": 3}
SHORT, LONG = CONSTANT | {"steps": 3}, CONSTANT | {"steps": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def cases(folder, strategy):
    """What is done in order, by name of its folder: a run, and what comes of it."""
    short = str(folder / f"{strategy}-raised")
    return {
        "whole": LONG,
        "raised": SHORT,
        "continued": LONG | {"continue_from": short, "lr": 1e-3},
        "initialised": SHORT | {"init_from": short},
        "raised ": LONG | {"resume": "auto"},
    }


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    listed = [
        {
            "architecture": "transformer",
            "output": f"{folder}/{strategy}-{name.strip()}",
            "train": settings,
            "parallel": {"strategy": strategy},
        }
        for strategy in STRATEGIES
        for name, settings in cases(folder, strategy).items()
    ]
    run_cases(folder, data, listed)
    for name, settings in cases(folder, "one").items():
        output = folder / f"one-{name.strip()}"
        train(distributed_run(data, architecture="transformer", output=output, train=settings))
    return folder


@EVERY
def test_the_raised_run_is_the_longer_one_to_the_bit(runs, strategy):
    assert_equal_runs(runs / f"{strategy}-raised", runs / f"{strategy}-whole")


@EVERY
@pytest.mark.parametrize("name", ["raised", "continued", "initialised"])
def test_two_processes_do_what_one_does(runs, strategy, name):
    one, two = (runs / f"{who}-{name}" for who in ("one", strategy))
    first, second = ([record["loss"] for record in records(folder, "step")] for folder in (one, two))
    assert first == pytest.approx(second, rel=TOLERANCE)
    events = [
        json.loads((folder / "run.json").read_text())["identity"]["history"][0] for folder in (one, two)
    ]
    known = [{key: event[key] for key in ("how", "step", "changed")} for event in events]
    assert known[0] == known[1]
