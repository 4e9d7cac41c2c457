"""What every command shares: interruptions, closed outputs, narrow terminals, the version, and whose git is asked."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table

import helmholtz
from helmholtz import _hardware
from helmholtz.cli.main import COMMANDS, main


def program(*arguments, folder=None, **more):
    """``helmholtz`` in a process of its own."""
    code = "import sys; from helmholtz_program import main; sys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, timeout=120, text=True,
        stderr=subprocess.PIPE, **({"stdout": subprocess.PIPE} | more),
    )  # fmt: skip


def replace_command(monkeypatch, command, run):
    monkeypatch.setattr(importlib.import_module(f"helmholtz.cli.{command}"), "run", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interruption_is_one_line(command, monkeypatch, capsys):
    def interrupted(arguments, console):
        signal.raise_signal(signal.SIGINT)

    replace_command(monkeypatch, command, interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == f"helmholtz {command}: interrupted\n"


def test_an_interruption_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = program("generate", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "helmholtz: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 1, "helmholtz data: MemoryError\n"),
        (OverflowError("int too large"), 1, "helmholtz data: int too large\n"),
        (RecursionError("too deep"), 1, "helmholtz data: too deep\n"),
        (
            FileNotFoundError(2, "No such file", "x"),
            2,
            "helmholtz data: error: [Errno 2] No such file: 'x'\n",
        ),
    ],
)
def test_errors_are_one_line(error, code, text, monkeypatch, capsys):
    def fail(arguments, console):
        raise error

    replace_command(monkeypatch, "data", fail)
    assert main(["data"]) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_enough(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = program(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")


def test_a_full_disk_at_the_other_end():
    with open("/dev/full", "w") as full:
        done = program("--help", stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_buffered_output_is_written_before_the_end_is_told(monkeypatch, capfd):
    """Python would complain at exit, when nobody can catch it."""
    reader, writer = os.pipe()
    os.close(reader)

    def prints(arguments, console):
        sys.stdout.write("a result")
        return 0

    replace_command(monkeypatch, "data", prints)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed):
        assert main(["data"]) == 1


@pytest.mark.parametrize("columns", ["0", "", "5"])
def test_a_table_is_printed_however_narrow(columns, monkeypatch, capsys):
    def prints(arguments, console: Console):
        table = Table("first column", "second column")
        table.add_row("1234567.1234567", "7654321.7654321")
        console.print(table)
        return 0

    monkeypatch.setenv("COLUMNS", columns)
    replace_command(monkeypatch, "compare", prints)
    assert main(["compare"]) == 0
    out = capsys.readouterr().out
    assert "1234567.1234567" in out and "7654321.7654321" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    python = ".".join(map(str, sys.version_info[:3]))
    wanted = f"helmholtz {helmholtz.__version__} (torch {torch.__version__}, python {python})\n"
    assert capsys.readouterr().out == wanted
    assert program("--version").stdout == wanted


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def hostile(tmp_path):
    """A repository whose configuration runs a program when its state is asked for."""
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    (tmp_path / "spy").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "spy").chmod(0o755)
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "config", "core.fsmonitor", str(tmp_path / "spy"))
    return tmp_path


def test_git_of_the_current_folder_is_not_asked(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    elsewhere = _hardware.git_commit()
    assert not (hostile / "ran").exists()
    monkeypatch.chdir("/")
    assert _hardware.git_commit() == elsewhere


def test_the_commit_is_that_of_the_sources(hostile, monkeypatch):
    """Whatever their configuration says; and a package inside somebody's repository is none of its commits."""
    monkeypatch.setattr(_hardware, "SOURCES", hostile)
    commit = _hardware.git_commit()
    assert len(commit) == 12 and not (hostile / "ran").exists()
    (hostile / "file").write_text("b")
    assert _hardware.git_commit() == f"{commit}-dirty" and not (hostile / "ran").exists()
    (hostile / "inside").mkdir()
    monkeypatch.setattr(_hardware, "SOURCES", hostile / "inside")
    assert _hardware.git_commit() == "unknown"


def test_brackets_in_names_are_no_styles(capsys, monkeypatch):
    """A run may be called anything, and a table shows it as it is."""

    def run(arguments, console):
        console.print(Table("[bold]column", title="[red]title"))
        console.print("[green]line")
        return 0

    monkeypatch.setitem(sys.modules, "helmholtz.cli.inspect", SimpleNamespace(run=run))
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "[bold]column" in out and "[red]title" in out and "[green]line" in out
