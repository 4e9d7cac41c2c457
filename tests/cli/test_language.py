"""``helmholtz study language`` from the shell: words, files, mistakes."""

import json

import pytest

from study_cases import call_study


def call(capsys, *arguments):
    return call_study(capsys, "language", "run", *arguments)


def fake(run, *, data, folder):
    bound = run.settings["model"] == "free_transformer"
    size = {"s": 10**4, "m": 10**5, "l": 10**6}[run.settings["size"]]
    bits = 3.0 + 0.1 * run.settings["seed"] - (0.5 if size == 10**6 else 0.0)
    return {"parameters": size, "kind": "bound" if bound else "exact", "bits_per_byte": bits}


def test_tables_slopes_and_what_is_missing(capsys, tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(
        "helmholtz.experiments.language.study.prepare_corpus", lambda *names: prepared.append(names[:2])
    )
    monkeypatch.setattr("helmholtz.experiments.language.study.compute_language", fake)
    options = (
        "--corpora",
        "shakespeare",
        "--tokenizers",
        "bytes",
        "--models",
        "baseline",
        "free_transformer",
    )
    code, out, _ = call(capsys, *options, "--seeds", 0, 1, "--shard=0/2", f"--output={tmp_path}")
    assert code == 0 and prepared == [("shakespeare", "bytes")]
    assert "4 of 4 runs computed" in out and "4 of 8 runs are missing" in out
    code, out, _ = call(capsys, *options, "--seeds", 0, 1, f"--output={tmp_path}")
    assert code == 0 and out.count("done before") == 4 and "0 of 8 runs are missing" in out
    assert "3.050 ± 0.071" in out and "< 3.050" in out
    (fit,) = json.loads((tmp_path / "scaling.json").read_text())["fits"]
    assert fit["runs"] == 6 and fit["slope"] == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "lstm"], "models must be one of"),
        (["--corpora", "austen"], "corpora must be one of"),
        (["--shard=2/2"], "shard must be i/n"),
        (["--steps=0"], "steps must be an integer of at least 1"),
        (["--model=x"], "did you mean 'models'"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, arguments, message):
    code, _, error = call(capsys, f"--output={tmp_path / 'new'}", f"--data={tmp_path / 'data'}", *arguments)
    assert code == 2 and message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
