import math
from dataclasses import replace

import pytest

from helmholtz.experiments.letters.data import LetterLaw
from helmholtz.experiments.letters.run import PROFILES, LetterExperiment
from helmholtz.experiments.records import read_lines, read_record
from study_cases import call_study

TINY = LetterExperiment(
    law=LetterLaw(n_characters=12, run_length=3), d_model=16, n_layers=2, n_heads=2, n_latent_bits=3, steps=4,
    batch_size=4, warmup_steps=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(PROFILES, "tiny", TINY)
    for name, value in {"N_SEQUENCES": 200, "N_GROUPS": 3, "GROUP_SIZE": 5}.items():
        monkeypatch.setattr(f"helmholtz.experiments.letters.report.{name}", value)


def call(capsys, *arguments):
    return call_study(capsys, "letters", "run", *arguments)


def test_the_experiment_from_the_shell(capsys, tmp_path):
    command = ("--profile=tiny", "--kappas", 0.25, 2, "--seeds", 4, f"--output={tmp_path}")
    code, out, _ = call(capsys, *command)
    assert code == 0
    runs = dict(read_lines(tmp_path / "runs.jsonl"))
    assert list(runs) == ["0.25-4", "2.0-4", "distribution", "vanilla-4"]
    own = runs.pop("distribution")
    assert own["settings"]["law"] == {"n_characters": 12, "run_length": 3, "noise": 0.0625}
    assert (
        own["result"]["noise_floor"] < own["result"]["vanilla_floor"] and own["result"]["law"]["valid"] == 1
    )
    for name, run in runs.items():
        assert f"{run['settings']['kappa_bits'] or 'vanilla'}-{run['settings']['seed']}" == name
        assert {"date", "commit", "hardware", "cpu_seconds"} <= run["timing"].keys()
        bounds = run["result"]["result"]["bounds"]
        assert bounds["n_sequences"] == 200
        assert math.isfinite(bounds["prior_cross_entropy"])
        for name, lines in run["result"]["samples"].items():
            assert [len(line) for line in lines] == [14] * 5
            assert len({line[:2] for line in lines}) == 1, "one prompt"
            assert f"  {name}" in out
            assert all(line in out for line in lines)
    assert (tmp_path / "letters.png").stat().st_size > 10_000
    for label in ("no plan", "1/4", "the distribution"):
        assert label in out


def test_finished_cells_are_not_computed_again(capsys, tmp_path, monkeypatch):
    command = ("--profile=tiny", "--seeds", 0, f"--output={tmp_path}")
    assert call(capsys, *command, "--kappas", 0.25)[0] == 0
    trained = []

    def spy(experiment, **settings):
        trained.append(settings["kappa_bits"])
        return train(experiment, **settings)

    from helmholtz.experiments.letters.run import train_on_letters as train

    monkeypatch.setattr("helmholtz.experiments.letters.study.train_on_letters", spy)
    before = read_record(tmp_path, "0.25-0")
    assert call(capsys, *command, "--kappas", 0.25, 1)[0] == 0
    assert trained == [1.0]
    assert read_record(tmp_path, "0.25-0") == before
    assert len(read_lines(tmp_path / "runs.jsonl")) == 4


def test_a_cell_of_other_settings_is_refused(capsys, tmp_path, monkeypatch):
    command = ("--profile=tiny", "--kappas", 0.25, f"--output={tmp_path}")
    assert call(capsys, *command)[0] == 0
    monkeypatch.setitem(PROFILES, "tiny", replace(TINY, steps=5))
    code, _, error = call(capsys, *command)
    assert code == 2
    assert "result of other settings: settings.experiment.steps" in error
    assert "choose another folder" in error


def test_a_damaged_cell_is_named(capsys, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "vanilla-0.json").write_text("{}")
    code, _, error = call(capsys, "--profile=tiny", f"--output={tmp_path}")
    assert code == 2
    assert "vanilla-0.json: damaged result" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile=big"], "profile must be one of ['ci', 'paper', 'tiny'], got 'big'"),
        (["--kappas", "-1"], "kappas must be a finite number of at least 0, got -1.0"),
        (["--kappas", "much"], "kappas must each be a number, got 'much'"),
        (["--kappa", "1"], "unknown option --kappa; did you mean 'kappas'?"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call(capsys, f"--output={tmp_path / 'new'}", *arguments)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
