import json
import sys
import types
from pathlib import Path

import pytest

from helmholtz.training.run import train
from helmholtz.training.tracking import Profile
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def tracker(monkeypatch):
    """What stands in for the packages, neither of which is installed for the tests; it notes what it is told."""
    calls = []
    module = types.ModuleType("trackio")
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append(("log", step, values))
    module.finish = lambda: calls.append(("finish",))
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_is_told_every_logged_step_and_evaluation(data, tmp_path, tracker, name):
    train(tiny_run(data, tmp_path / "mine", tracker=name, project="p", log_every=5, steps=10))
    kinds = [call[0] for call in tracker]
    assert kinds == ["init", "log", "log", "log", "log", "finish"]
    options = tracker[0][1]
    assert (options["project"], options["name"]) == ("p", "mine")
    assert options["config"]["train"]["lr"] == 3e-3
    records = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    for (_, step, values), record in zip(tracker[1:5], records, strict=True):
        assert step == record["step"]
        name, key = (
            ("train/loss", "loss") if record["kind"] == "step" else ("validation/loss", "validation_loss")
        )
        assert values[name] == record[key]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(data, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"train.tracker={name} needs its package: pip install {name}"):
        train(tiny_run(data, tmp_path / "run", tracker=name))
    assert not (tmp_path / "run").exists()


def test_the_profile_of_some_steps_is_written(data, tmp_path):
    train(tiny_run(data, tmp_path, steps=8), callbacks=[Profile(tmp_path)])
    assert "aten::" in (tmp_path / "profile" / "table.txt").read_text()
    names = {
        event.get("name", "")
        for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert "ProfilerStep#2" in names
    assert "ProfilerStep#6" not in names


def test_utilization_is_logged_when_asked_for_and_changes_no_loss(data, tmp_path):
    train(tiny_run(data, tmp_path / "plain", steps=4))
    train(tiny_run(data, tmp_path / "asked", steps=4, utilization=True))

    def steps(folder: Path):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "step"]

    plain, asked = steps(tmp_path / "plain"), steps(tmp_path / "asked")
    assert [record["loss"] for record in plain] == [record["loss"] for record in asked]
    assert not any("utilization" in record for record in plain)
    assert all(0 < record["utilization"] < 1.5 for record in asked)
