import json

import pytest
import torch

from helmholtz.cli.main import main
from helmholtz.cli.studies import continual, recall
from helmholtz.cli.studies.learners import LEARNERS, build_learner
from helmholtz.experiments.recall.patterns import Corruption


def call(capsys, *arguments):
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setitem(recall.PROFILES, "tiny", {8: (4,), 16: (4, 8)})
    monkeypatch.setitem(recall.MASKED, "tiny", ((16, 8),))
    monkeypatch.setitem(recall.PAIRS, "tiny", (12,))
    monkeypatch.setattr(recall, "SPOILT", (Corruption("mask", 0.5),))


def test_recall_from_the_shell(capsys, tmp_path, _tiny):
    command = (
        "study",
        "recall",
        "run",
        "--profile=tiny",
        "--trials=25",
        "--pairs=1",
        "--train_steps=3",
        f"--output={tmp_path}",
    )
    code, out, _ = call(capsys, *command)
    assert code == 0
    content = json.loads((tmp_path / "recall.json").read_text())
    assert len(content["patterns"]) == 3 * 4 + 1 and len(content["values"]) == 12
    assert {"date", "commit", "hardware", "seed"} <= content.keys()
    assert all(row["agrees"] and row["n_trials"] == 25 for row in content["patterns"] + content["values"])
    assert content["in_context"]["written"]["accuracy"] >= 0.99
    assert content["in_context"]["untrained mamba_hopfield"]["steps"] == 0
    assert content["in_context"]["trained mamba_hopfield"]["steps"] == 3
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert "32 pairs in a context, written: 1.000 (chance 0.016)" in out and "mask 0.5" in out


def test_the_profile_of_capacities_has_no_values_to_recall(capsys, tmp_path, monkeypatch):
    assert recall.MASKED["capacity"] == recall.PAIRS["capacity"] == ()
    monkeypatch.setitem(recall.PROFILES, "capacity", {8: (4, 8)})
    code, out, _ = call(
        capsys, "study", "recall", "run", "--profile=capacity", "--trials=10", f"--output={tmp_path}"
    )
    assert code == 0 and "Values recalled" not in out
    content = json.loads((tmp_path / "recall.json").read_text())
    assert [row["n_patterns"] for row in content["patterns"]] == [4] * 4 + [8] * 4
    assert content["values"] == []


def test_continual_from_the_shell(capsys, tmp_path):
    command = (
        "study",
        "continual",
        "run",
        "--seeds",
        3,
        4,
        "--tasks=2",
        "--inputs=10",
        "--steps=3",
        f"--output={tmp_path}",
    )
    code, out, _ = call(capsys, *command)
    assert code == 0
    content = json.loads((tmp_path / "continual.json").read_text())
    assert content["seeds"] == [3, 4] and content["learner"] == "transformer"
    assert {"date", "commit", "hardware", "joint"} <= content.keys()
    assert list(content["runs"]) == list(continual.runs(continual.MapTask(), 1))
    for run in content["runs"].values():
        assert len(run["seeds"]) == 2
        assert len(run["seeds"][0]["matrix"]) == len(run["seeds"][0]["matrix"][0]) == 2
    assert content["runs"]["memory"]["seeds"][0]["accuracy"] == 1
    assert content["runs"]["small, fifo"]["config"]["n_slots"] == 12
    assert (tmp_path / "continual.png").stat().st_size > 10_000
    assert "all maps at once" in out and "Mean of 2 seeds; chance 0.10" in out


def test_every_learner_can_be_built():
    for name in LEARNERS:
        model = build_learner(name, vocab_size=30, n_tokens=4, seed=1)
        again = build_learner(name, vocab_size=30, n_tokens=4, seed=1)
        assert (model.config.vocab_size, model.config.max_seq_len) == (30, 4)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["study", "recall", "run", "--profile=huge"],
            "profile must be one of ['capacity', 'ci', 'full'], got 'huge'",
        ),
        (["study", "recall", "run", "--trials=0"], "trials must be an integer of at least 1, got 0"),
        (
            ["study", "recall", "run", "--train_steps=-1"],
            "train_steps must be an integer of at least 0, got -1",
        ),
        (["study", "continual", "run", "--learner=mambo"], "did you mean 'mamba'?"),
        (["study", "recall", "run", "--learner=rnn"], "learner must be one of"),
        (["study", "continual", "run", "--seeds", "-1"], "seeds must be an integer of at least 0, got -1"),
        (["study", "continual", "run", "--step", "1"], "unknown option --step; did you mean 'steps'?"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call(capsys, *arguments, f"--output={tmp_path / 'new'}")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
