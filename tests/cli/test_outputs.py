"""Where a command writes at its end is tried before it computes anything, and standard output names itself."""

import importlib
import inspect
import re

import pytest

from helmholtz.cli.main import COMMANDS, main

NOWHERE = "no-such-checkpoint"
WRITING = {
    "compare": ["--runs", NOWHERE, "--output"],
    "export": [NOWHERE],
    "inspect": ["--checkpoint", NOWHERE, "--text=a", "--picture"],
    "landscape": ["--checkpoint", NOWHERE, "--text=a", "--output"],
    "plan": ["--checkpoint", NOWHERE, "--prompt=a", "--picture"],
    "report": [NOWHERE, "--output"],
    "validate": ["--checkpoint", NOWHERE, "--output"],
}
OPTIONS = re.compile(r'"--(output|picture|save)"|"folder", type=str, help="a new')


def test_every_command_that_writes_is_here():
    modules = {name: importlib.import_module(f"helmholtz.cli.{name}") for name in COMMANDS}
    writing = {name for name, module in modules.items() if OPTIONS.search(inspect.getsource(module))}
    assert writing - {"study"} == set(WRITING)  # whose queue makes locks in the folder before it computes


@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_be_written_is_named_before_the_checkpoint_is_looked_for(
    command, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below" / "x.png"
    assert main([command, *WRITING[command], str(place)]) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"(output|picture|folder): {place} cannot be written \(Not a directory\)$", said.strip()
    )
    assert said.count("\n") == 1 and NOWHERE not in said


def test_what_would_be_a_folder_or_no_figure_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path), f"--output={tmp_path}"]) == 2
    assert "output must be a file, not a folder" in capsys.readouterr().err
    assert main(["plan", f"--checkpoint={NOWHERE}", "--encode=a", f"--save={tmp_path}"]) == 2
    assert "save must be a file, not a folder" in capsys.readouterr().err
    assert main(["inspect", f"--checkpoint={NOWHERE}", "--text=a", f"--picture={tmp_path / 'x.doc'}"]) == 2
    assert "picture must be a name that ends in one of" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"]], ids=" ".join)
def test_standard_output_names_itself_where_it_cannot_be_written(arguments, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said == f"helmholtz {arguments[0]}: error: standard output: No space left on device\n"
