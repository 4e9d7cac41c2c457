"""A display that cannot be written any more does not end the work that it tells of."""

import errno
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from helmholtz._display import losable, make_losable
from helmholtz.cli import data as data_command
from helmholtz.cli.study import compute
from helmholtz.experiments.queue import split_finished
from helmholtz.training.callbacks import Callback
from helmholtz.training.run import train
from study_cases import Numbers
from tiny_runs import prepare_text, tiny_run

BROKEN = [errno.EPIPE, errno.ENOSPC, errno.EIO]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


class BreaksAfter(io.StringIO):
    """Takes some writes, then fails: its reader has gone, its disk is full, its terminal was closed."""

    def __init__(self, number, writes=0):
        super().__init__()
        self.number, self.writes = number, writes

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(self.number, os.strerror(self.number))  # EPIPE makes it a BrokenPipeError
        return super().write(text)


@pytest.mark.parametrize("number", BROKEN)
@pytest.mark.parametrize("terminal", [False, True])
def test_training_goes_on_when_its_display_is_lost(data, tmp_path, capsys, number, terminal):
    stream = BreaksAfter(number, writes=1)
    console = Console(file=stream, force_terminal=terminal)
    result = train(tiny_run(data, tmp_path / "run", steps=6, eval_every=2, save_every=3), console=console)
    assert (result.status, result.step) == ("finished", 6)
    assert console.file is stream
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: progress cannot be shown any more ({os.strerror(number)}); the work goes on"]


def test_training_goes_on_when_its_display_is_closed(data, tmp_path, capsys):
    console = Console(file=io.StringIO())

    class Close(Callback):
        def on_step(self, record):
            console.file.close()

    assert train(tiny_run(data, tmp_path / "run", steps=4), callbacks=[Close()], console=console).step == 4
    assert "closed" in capsys.readouterr().err


@pytest.mark.parametrize("number", BROKEN)
def test_a_queue_goes_on_when_nobody_reads_it(tmp_path, capsys, number):
    study = Numbers("run", {"seeds": [0, 1, 2], "output": str(tmp_path), "shard": "0/1", "threads": 1})
    compute(study, Console(file=BreaksAfter(number, writes=1)))
    assert split_finished(tmp_path, study.runs())[1] == []
    assert capsys.readouterr().err.count("\n") == 1


def test_data_is_prepared_when_nobody_reads_of_it(monkeypatch):
    console, reached = Console(file=BreaksAfter(errno.EPIPE)), []

    def work(*arguments, **options):
        console.print("progress")
        reached.append("prepare")
        raise ValueError("far enough")

    monkeypatch.setattr(data_command, "prepare", work)
    with pytest.raises(ValueError, match="far enough"):
        data_command.run(["--data.folder=x"], console)
    assert reached == ["prepare"]


def test_letters_that_the_terminal_does_not_have_are_replaced():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    with losable(console):
        console.print("the run is in na\u00efve")
    assert raw.getvalue() == b"the run is in na?ve\n"


def test_what_can_be_written_is_written():
    console = Console(file=io.StringIO())
    stream = console.file
    make_losable(console)
    make_losable(console)
    console.print("a line")
    assert stream.getvalue() == "a line\n"


PROGRAM = """
import os, signal, sys
from helmholtz.cli import train
from helmholtz.cli.main import main
from helmholtz.training.callbacks import Callback

class HangUp(Callback):
    def on_step(self, record):
        if record.step == 5:
            os.kill(os.getpid(), signal.SIGHUP)

trained = train.train
train.train = lambda config, *, callbacks, console: trained(config, callbacks=[HangUp()], console=console)
sys.exit(main(sys.argv[1:]))
"""


def test_a_closed_terminal_saves_and_ends_in_order(data, tmp_path, heard_hangups):
    """A hang-up while nobody reads standard output: what the end of an ssh session does to ``train | tee``."""
    reader, writer = os.pipe()
    os.close(reader)
    options = [f"--data.folder={data.folder}", "--data.tokenizer=bytes", "--data.validation_fraction=0.1"]
    options += ["--model.architecture=transformer", "--model.d_model=16", "--model.n_layers=1"]
    options += ["--model.n_heads=2", "--model.max_seq_len=32", "--train.steps=9", "--train.seq_len=16"]
    options += ["--train.warmup_steps=1", "--train.batch_size=2", "--train.eval_every=2"]
    options += ["--train.eval_tokens=64", f"--train.output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train", *options],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "warning: progress cannot be shown any more (Broken pipe); the work goes on\n"
    assert (tmp_path / "run" / "step-00000005").is_dir()
