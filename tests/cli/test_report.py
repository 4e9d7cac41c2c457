"""``helmholtz report`` from the shell."""

import json

import pytest

from helmholtz.cli.main import main


def call(capsys, *arguments):
    code = main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_page_from_a_folder(capsys, tmp_path):
    folder = tmp_path / "mad" / "quick" / "results"
    folder.mkdir(parents=True)
    run = {"settings": {"task": "compression", "model": "attention", "seed": 0}, "result": {"score": 0.25}}
    (folder / "a.json").write_text(json.dumps(run))
    page = tmp_path / "out" / "page.html"
    code, out, _ = call(capsys, tmp_path, f"--output={page}")
    assert code == 0 and str(page) in out.replace("\n", "")
    assert "MAD: six synthetic tasks: done" in out and "Vision: no results" in out
    text = page.read_text()
    assert text.startswith("<!doctype html>") and ">25.0%</td>" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "folders must be folders of results, got 'nowhere'"),
        ([], "folders"),
        (["--outputs=x"], "did you mean 'output'"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(capsys, *arguments)
    assert code == 2 and message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(capsys, tmp_path):
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "matrix.json").write_text(
        '{"rows": [{"fault": "x"}], "kill_points": 1, "seconds": 2}'
    )
    code, _, error = call(capsys, tmp_path, f"--output={tmp_path / 'page.html'}")
    assert code == 2 and "matrix.json#/rows/0: no 'processes' there" in error
    assert not (tmp_path / "page.html").exists()
