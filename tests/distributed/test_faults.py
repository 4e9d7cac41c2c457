"""A process of two is killed: the other says so and ends, torchrun starts both again, and the run is the same.

Or its numbers are not finite: both end, and say where they were first seen.
"""

import json
import re
import signal

import pytest

from distributed_cases import TESTS, torchrun
from fault_cases import completed, losses, lost
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run

SETTINGS = {"steps": 6, "save_every": 2, "eval_every": 6}
EVENT = 5
"""Of rank 1: in a step after the first checkpoint."""


def completed_step(folder):
    return int((folder / "last").resolve().name.removeprefix("step-"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_numbers_of_one_process_that_are_not_finite_end_both_with_their_place(tmp_path):
    data = prepare_text(tmp_path)
    done = torchrun([TESTS / "distributed" / "poisoned.py", data.folder, tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    places = {
        "parameter": r"parameter blocks\.0\.mlp\.down_proj\.weight: 1 of \d+ values .*\(rank 1\)",
        "output": r"output of blocks\.1 .*\(rank 1\)",
        "gradient": r"gradient of \S+: .*\(rank [01]\)",
        "evaluation": r"output of blocks\.1 .*\(rank 1\)",
    }
    for place, words in places.items():
        told = [line for line in done.stdout.splitlines() if line.startswith(f"{place}: ")]
        assert len(told) == 2 and told[0] == told[1], done.stdout + done.stderr
        found = json.loads((tmp_path / place / "non_finite.json").read_text())
        assert re.fullmatch(words, found["first"]), found
        assert found["first"] in told[0]
        assert found["step"] == (4 if place == "evaluation" else 3), "the one that comes next"
        assert completed_step(tmp_path / place) == 2
