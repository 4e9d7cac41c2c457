"""A process killed at any moment loses no completed checkpoint, and the resumed run is the uninterrupted one."""

import random
import signal

import pytest
import torch

from fault_cases import completed, count_events, losses, lost, run_until
from tiny_runs import prepare_text

SETTINGS = {"steps": 8, "save_every": 2, "eval_every": 2, "threads": 1}
N_KILLS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The uninterrupted run: its folder and the number of its events."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", count_events(data, folder / "run", **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(N_KILLS))
def test_a_kill_loses_nothing(data, whole, tmp_path, seed):
    reference, n_events = whole
    folder = tmp_path / "run"
    at = random.Random(seed).randrange(1, n_events + 1)
    assert run_until(data, folder, at, **SETTINGS) == -signal.SIGKILL
    assert lost(folder) == ""
    before = completed(folder).get("last", 0)
    assert run_until(data, folder, None, resume="auto", **SETTINGS) == 0
    assert losses(folder) == losses(reference)
    assert completed(folder)["last"] == SETTINGS["steps"] >= before
