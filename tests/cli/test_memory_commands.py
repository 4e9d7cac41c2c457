import pytest
import torch

from helmholtz.experiments.continual.study import JOINT, methods
from helmholtz.experiments.equilibrium import study as equilibrium
from helmholtz.experiments.recall import study as recall
from helmholtz.experiments.recall.data import MapTask
from helmholtz.experiments.recall.learners import LEARNERS, build_learner
from helmholtz.experiments.recall.patterns import Corruption
from helmholtz.experiments.recall.study import PROFILES, Profile
from helmholtz.experiments.records import read_lines
from study_cases import call_study


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setattr(recall, "N_WRITTEN", 50)
    monkeypatch.setitem(PROFILES, "tiny", Profile({8: (4,), 16: (4, 8)}, ((16, 8),), (12,)))
    monkeypatch.setattr(recall, "CORRUPTED", (Corruption("mask", 0.5),))


def results_of(folder, part):
    """Results of the runs on disk by their names."""
    records = read_lines(folder / "runs.jsonl").values()
    return {r["name"]: r["result"] for r in records if r["settings"]["part"] == part}


def test_recall_from_the_shell(capsys, tmp_path, _tiny):
    options = ("--profile=tiny", "--trials=25", "--pairs=1", "--train_steps=3", f"--output={tmp_path}")
    code, out, _ = call_study(capsys, "recall", "run", *options)
    assert code == 0 and "0 of 28 runs are missing" in out
    assert len(results_of(tmp_path, "patterns")) == 3 * 4 + 1 and len(results_of(tmp_path, "values")) == 12
    rows = results_of(tmp_path, "patterns") | results_of(tmp_path, "values")
    assert all(row["agrees"] and row["n_trials"] == 25 for row in rows.values())
    untrained, trained, written = results_of(tmp_path, "context").values()
    assert (written["accuracy"] >= 0.99, untrained["steps"], trained["steps"]) == (True, 0, 3)
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert "32 pairs in a context, written: 1.000 (chance 0.016)" in out and "mask 0.5" in out
    assert "1 pairs in a context, trained mamba_hopfield:" in out and "DIFFERS" not in out
    again = call_study(capsys, "recall", "run", *options)[1]
    assert again.count("done before") == 28 and "begins" not in again


def test_the_profile_of_capacities_does_nothing_else(capsys, tmp_path, monkeypatch):
    assert PROFILES["capacity"].corrupted == PROFILES["capacity"].pairs == ()
    monkeypatch.setitem(PROFILES, "capacity", Profile({8: (4, 8)}))
    options = ("--profile=capacity", "--trials=10", f"--output={tmp_path}")
    code, out, _ = call_study(capsys, "recall", "run", *options)
    assert code == 0 and "Values recalled" not in out and "pairs in a context" not in out
    sizes = [row["n_patterns"] for row in results_of(tmp_path, "patterns").values()]
    assert sizes == [4] * 4 + [8] * 4 and not results_of(tmp_path, "values")


def test_continual_from_the_shell(capsys, tmp_path):
    options = ("--tasks=2", "--inputs=10", "--steps=3", f"--output={tmp_path}")
    code, out, _ = call_study(capsys, "continual", "run", "--seeds", 3, 4, *options)
    assert code == 0 and "0 of 12 runs are missing" in out
    records = read_lines(tmp_path / "runs.jsonl")
    assert {(r["settings"]["method"], r["settings"]["seed"]) for r in records.values()} == {
        (method, seed) for method in methods(MapTask(), 1) for seed in (3, 4)
    }
    assert {r["settings"]["learner"] for r in records.values()} == {"transformer"}
    assert records["memory-4"]["result"]["accuracy"] == 1
    assert (
        len(records["memory-3"]["result"]["matrix"]) == len(records["memory-3"]["result"]["matrix"][0]) == 2
    )
    assert len(records["all_maps_at_once-3"]["result"]["accuracies"]) == 2
    assert records["small_fifo-3"]["settings"]["config"]["n_slots"] == 12
    assert (tmp_path / "continual.png").stat().st_size > 10_000
    assert JOINT in out and "Mean of 2 seeds; chance 0.10" in out
    assert call_study(capsys, "continual", "run", "--seeds", 3, 5, *options)[1].count("done before") == 6


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
            ["recall", "run", "--profile=huge"],
            "profile must be one of ['capacity', 'ci', 'full'], got 'huge'",
        ),
        (["recall", "run", "--trials=0"], "trials must be an integer of at least 1, got 0"),
        (
            ["recall", "run", "--train_steps=-1"],
            "train_steps must be an integer of at least 0, got -1",
        ),
        (["continual", "run", "--learner=mambo"], "did you mean 'mamba'?"),
        (["recall", "run", "--learner=rnn"], "learner must be one of"),
        (["continual", "run", "--seeds", "-1"], "seeds must be an integer of at least 0, got -1"),
        (["continual", "run", "--step", "1"], "unknown option --step; did you mean 'steps'?"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call_study(capsys, *arguments, f"--output={tmp_path / 'new'}")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_equilibrium_from_the_shell(capsys, tmp_path, monkeypatch):
    """Models are not trained here: ``tests/learn/test_equilibrium.py`` does that."""

    def learn_pairs(seed, *, equilibrium, steps):
        return {"accuracy": (seed + equilibrium) / 4}

    def learn_stability(seed, *, stability_weight, steps):
        return dict.fromkeys(("before", "after", "largest_after"), seed + stability_weight)

    for fake in (learn_pairs, learn_stability):
        monkeypatch.setattr(equilibrium, fake.__name__, fake)
    options = ("--tasks", "pairs", "stability", "--seeds", 1, 2, f"--output={tmp_path}")
    code, out, _ = call_study(capsys, "equilibrium", "run", *options)
    assert code == 0 and "0 of 4 runs are missing" in out and "bytes of" not in out
    records = read_lines(tmp_path / "runs.jsonl")
    assert list(records) == ["pairs-1", "pairs-2", "stability-1", "stability-2"]
    assert records["pairs-2"]["result"] == {"accuracy": 0.75, "accuracy_blocks_alone": 0.5}
    assert records["stability-1"]["result"] == {
        "before": 11.0, "after": 11.0, "largest_after": 11.0,
        "after_without_term": 1.0, "largest_after_without_term": 1.0,
    }  # fmt: skip
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "pairs recall of pairs in a context 62.5% 50.0% to 75.0%" in rows
    assert "stability after, without 1.50 1.00 to 2.00" in rows
