"""A process of two is killed: the other says so and ends, torchrun starts both again, and the run is the same."""

import json
import signal

import pytest

from distributed_cases import TESTS, torchrun
from fault_cases import completed, losses, lost
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run

SETTINGS = {"steps": 6, "save_every": 2, "eval_every": 6}
EVENT = 5
"""Of rank 1: in a step after the first checkpoint."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_ends_the_run_and_a_restart_goes_on_exactly(tmp_path):
    data, folder = prepare_text(tmp_path), tmp_path / "run"
    changes = json.dumps(SETTINGS)
    arguments = [TESTS / "faults" / "rank.py", data.folder, folder, 1, EVENT, int(signal.SIGKILL), changes]
    done = torchrun(arguments, options=["--max-restarts=1"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 of 2 lost another rank" in done.stdout, done.stderr
    assert "finished after step 6" in done.stdout
    assert lost(folder) == ""
    assert completed(folder)["last"] == 6
    train(tiny_run(data, tmp_path / "one", **SETTINGS))
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
