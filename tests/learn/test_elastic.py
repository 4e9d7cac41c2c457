"""``make learn``: a machine joins an elastic run and is lost again; the run goes on from its newest checkpoint."""

import json
import re
import subprocess
import time

import pytest

from distributed_cases import TESTS, torchrun_command
from fault_cases import completed, lost
from tiny_runs import prepare_text

PORT = 29_533
SETTINGS = {"steps": 2000, "save_every": 50, "eval_every": 1000, "threads": 1}


class Machine:
    """A torchrun of its own that waits for others at the same address."""

    def __init__(self, data, folder, output):
        self.output = output
        options = [
            "--nnodes=1:2",
            f"--rdzv-endpoint=localhost:{PORT}",
            "--rdzv-id=elastic",
            "--max-restarts=3",
        ]
        script = [TESTS / "faults" / "rank.py", data.folder, folder, 0, 0, 9, json.dumps(SETTINGS)]
        # torch 2.13 does not tell a machine that joins later where the shared store is
        own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command, environment = torchrun_command(script, size=1, options=options, **own_store)
        with output.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def has_a_process(self):
        """Beside torchrun itself: all have met by then."""
        return subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True).returncode == 0

    def lose(self):
        """Its process and torchrun, at once."""
        subprocess.run(["pkill", "-9", "-P", str(self.process.pid)], check=True)
        self.process.kill()
        self.process.wait()


def steps(folder):
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [record["step"] for record in records if "loss" in record]


def wait_for(condition, machine):
    while not condition():
        assert machine.process.poll() is None, machine.output.read_text()
        time.sleep(0.1)


@pytest.mark.learn
@pytest.mark.timeout(4 * 3600)
def test_a_machine_that_joins_and_is_lost_costs_no_step(tmp_path):
    data, folder = prepare_text(tmp_path), tmp_path / "run"
    first = Machine(data, folder, tmp_path / "first.txt")
    wait_for(lambda: len(steps(folder)) >= 100, first)
    second = Machine(data, folder, tmp_path / "second.txt")
    wait_for(second.has_a_process, second)
    before = len(steps(folder))
    wait_for(lambda: len(steps(folder)) >= before + 20, second)
    second.lose()
    assert first.process.wait() == 0, first.output.read_text()
    said = first.output.read_text()
    assert re.search("rank [01] of 2 lost another rank in step", said), said
    assert lost(folder) == "" and completed(folder)["last"] == SETTINGS["steps"]
    assert steps(folder) == list(range(1, SETTINGS["steps"] + 1))
