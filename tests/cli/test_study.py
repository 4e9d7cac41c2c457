"""``helmholtz study``: what there is, what is done and missing, and reports that compute nothing."""

import json

import pytest
import torch

from helmholtz.cli.main import COMMANDS, MOVED, main
from helmholtz.cli.study import STUDIES
from helmholtz.experiments.mad import run as mad_run
from helmholtz.experiments.mad.data import TASKS
from helmholtz.experiments.mad.run import PROFILES
from helmholtz.experiments.recall import study as recall
from helmholtz.layers.mlp import SwiGLU
from mad_cases import profile, protocol
from study_cases import Numbers, call_study


def test_studies_are_listed(capsys):
    for arguments, wanted in (((), 2), (("--help",), 0)):
        code, out, _ = call_study(capsys, *arguments)
        assert code == wanted and "usage: helmholtz study <name> <action>" in out
        assert all(f"  {name} " in out for name in STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_runs_reports_and_lists(capsys, study):
    for arguments, wanted in (((), 2), (("--help",), 0)):
        code, out, _ = call_study(capsys, study, *arguments)
        assert code == wanted and f"usage: helmholtz study {study} <action>" in out
        assert all(f"  {action} " in out for action in ("run", "report", "list"))
    code, _, error = call_study(capsys, study, "rum")
    assert code == 2 and "action must be one of" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_reports_and_lists_of_nothing_compute_nothing_and_leave_nothing(capsys, tmp_path, monkeypatch, study):
    if study in ("vision", "forecasting"):
        monkeypatch.setattr(f"helmholtz.experiments.{study}.study.load_data", lambda *arguments: [])
    chosen = dict.fromkeys(PROFILES["pilot"].models, 1e-3)  # what quick asks the pilot for
    monkeypatch.setattr(mad_run, "LEARNING_RATES", dict.fromkeys(TASKS, chosen))
    output = f"--output={tmp_path / 'new'}"
    for action in ("list", "report"):
        code, out, error = call_study(capsys, study, action, output)
        assert (code == 2 and "output must be a folder" in error) or (code == 0 and "missing" in out)
        assert list(tmp_path.iterdir()) == []


def test_a_list_says_what_is_done(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(PROFILES, "tiny", profile(protocol=protocol(steps=2, n_evaluations=2)))
    common = ("--profile=tiny", f"--output={tmp_path}")
    assert call_study(capsys, "mad", "run", "--shard=0/4", *common)[0] == 0
    lines = call_study(capsys, "mad", "list", *common)[1].splitlines()
    words = [line.split()[0] for line in lines[:-1]]
    assert words == ["done", "missing", "missing", "missing"] * 2
    assert lines[-1].startswith("6 of 8 runs are missing")


class Drawn(Numbers):
    """The deviation of a linear map of 400 inputs."""

    def compute(self, run, note):
        assert "start" not in run.settings
        torch.manual_seed(run.settings["seed"])
        return {"square": round(SwiGLU(400, 50).gate_up_proj.weight.std().item(), 3)}


def test_a_study_starts_as_its_committed_results_did_unless_it_is_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("helmholtz.cli.study.load_study", lambda name: Drawn)
    kept, other = f"--output={tmp_path / 'kept'}", f"--output={tmp_path / 'other'}"
    for folder, start, expected in ((kept, "0.02", "0.02"), (other, "fan_in", "0.029")):
        for action in ("run", "report"):
            code, out, _ = call_study(capsys, "letters", action, "--seeds=4", f"--start={start}", folder)
            assert code == 0 and expected in out.split()
    line = json.loads((tmp_path / "kept" / "runs.jsonl").read_text())
    assert line["settings"] == {"seed": 4}, "as before there was a choice"
    line = json.loads((tmp_path / "other" / "runs.jsonl").read_text())
    assert line["settings"] == {"seed": 4, "start": "fan_in"}
    for folder, start in ((kept, "fan_in"), (other, "0.02")):
        code, _, error = call_study(capsys, "letters", "report", "--seeds=4", f"--start={start}", folder)
        assert code == 2 and "a result of other settings" in error
    code, _, error = call_study(capsys, "letters", "run", "--seeds=4", "--start=wide", kept)
    assert code == 2 and "start must be one of" in error


@pytest.mark.parametrize("old", MOVED)
def test_a_command_that_is_a_study_now_says_so(capsys, old):
    assert old not in COMMANDS and MOVED[old] in STUDIES
    assert main([old, "--output=x"]) == 2
    assert f"helmholtz study {MOVED[old]} run" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["recall", "continual"])
def test_a_report_prints_what_its_run_printed(capsys, tmp_path, monkeypatch, study):
    monkeypatch.setattr(recall, "N_WRITTEN", 5)
    monkeypatch.setitem(recall.PROFILES, "ci", recall.Profile({8: (4,)}, ((8, 4),), (12,)))
    sizes = {"recall": ["--trials=10", "--pairs=1"], "continual": ["--tasks=2", "--inputs=6", "--steps=2"]}
    options = [*sizes[study], f"--output={tmp_path}"]
    code, printed, _ = call_study(capsys, study, "run", *options)
    assert code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    code, again, _ = call_study(capsys, study, "report", *options)
    assert code == 0 and again in printed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert "missing  " not in call_study(capsys, study, "list", *options)[1]
    (tmp_path / "runs.jsonl").write_text(before["runs.jsonl"].decode().replace('"result"', '"results"', 1))
    code, _, error = call_study(capsys, study, "report", *options)
    assert code == 2 and "runs.jsonl, line 1: damaged" in error and len(error.splitlines()) == 1
