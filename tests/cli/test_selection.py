"""``helmholtz study selection`` from the shell, on sizes that take no time."""

import json

import pytest

from helmholtz.experiments.selection.data import SelectionTask
from study_cases import call_study


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    study = "helmholtz.experiments.selection.run"
    for name, value in {
        "GAP_CHANNELS": 200, "BETAS": (1.0, 5.0), "N_TEST": 32, "N_ATTRIBUTED": 8, "PATTERN_SIZES": ((2, 1, 2),),
        "PATTERN_DRAWS": 50,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"{study}.{name}", value)
    from helmholtz.experiments.selection.run import SelectionStudy

    small = SelectionStudy(
        batch_size=4,
        maximum=SelectionTask(n_tokens=4, n_channels=4),
        named=SelectionTask(target="named", n_tokens=3, n_channels=8),
    )
    monkeypatch.setattr("helmholtz.experiments.selection.study.SelectionStudy", lambda steps=3: type(small)(
        steps=steps, batch_size=4, maximum=small.maximum, named=small.named))  # fmt: skip


def call(capsys, *arguments):
    return call_study(capsys, "selection", "run", *arguments)


def test_the_study_from_the_shell_and_again(capsys, tmp_path):
    code, out, _ = call(capsys, "--seeds", 0, "--steps=2", f"--output={tmp_path}")
    assert code == 0
    names = [json.loads(line)["name"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(names) == 16 and "gaps-0" in names
    before = (tmp_path / "runs.jsonl").read_bytes()
    for text in ("attention, values learned", "free energy, 8 heads", "t^D", "bound"):
        assert text in out
    for picture in ("gaps.png", "reads.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    code, out, _ = call(capsys, "--seeds", 0, "--steps=2", f"--output={tmp_path}")
    assert code == 0 and out.count("done before") == 16
    assert before == (tmp_path / "runs.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "steps must be an integer of at least 1"),
        (["--stepps=3"], "did you mean 'steps'"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call(capsys, f"--output={tmp_path / 'new'}", *arguments)
    assert code == 2 and message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_other_settings_are_refused(capsys, tmp_path):
    assert call(capsys, "--seeds", 0, "--steps=2", f"--output={tmp_path}")[0] == 0
    code, _, error = call(capsys, "--seeds", 0, "--steps=3", f"--output={tmp_path}")
    assert code == 2 and "settings.steps" in error
