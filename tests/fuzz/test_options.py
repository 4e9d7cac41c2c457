"""Junk for every option of every command: a result, or one line that names the option or what came."""

import functools
import importlib
import io
import itertools
import re
import shutil
from unittest import mock

import pytest
import torch
from hypothesis import settings

from fuzzing import call, snapshot
from helmholtz.cli.arguments import PATHS, Parser
from helmholtz.cli.main import COMMANDS, main
from helmholtz.cli.study import STUDIES, load_study
from helmholtz.experiments.mad import run as mad_run
from helmholtz.experiments.mad.data import TASKS
from helmholtz.models import MODELS
from tiny_runs import prepare_text

pytestmark = pytest.mark.fuzz

BIG = str(10**30)
JUNK = ["", "missing/file", "folder", "file", "-1", "0", "1e30", "nan", BIG, "\u00fc\udcff", "x" * 5000, "null",
        "[", "{a: 1, a: 2}", "~nosuchuser/x", "[[]]", "unreadable", "a.b", "1.5", "-" * 3]  # fmt: skip
RUN = {
    "steps": 2,
    "batch_size": 2,
    "seq_len": 16,
    "warmup_steps": 1,
    "eval_every": 2,
    "eval_tokens": 64,
    "threads": 1,
}
SIZES = ["--model.d_model=16", "--model.n_layers=1", "--model.max_seq_len=32"]
LONG = [("data.prepare", "shakespeare_files"), ("cli.report", "build_sections"), ("cli.data", "prepare_dataset"),
        ("interop.hf.export", "export"), ("experiments.language.study", "prepare_corpus"),
        ("cli.study", "run_queue"), ("cli.study", "fold_finished"), ("experiments.forecasting.study", "load_data"),
        ("experiments.vision.study", "load_data"), ("cli.explore", "launch")]  # fmt: skip
"""Work that begins without a module of torch, and results that are read."""


NOT_OURS = {"help", "config", "print_config", "print_shtab"}


class Reached(BaseException):
    """A command begins to compute: its options are what it takes."""


def reach(*arguments, **named):
    raise Reached


@functools.cache
def prefixes():
    """Every command with every action that it has, and ``train`` with every architecture."""
    found = []
    for command in COMMANDS:
        actions = getattr(importlib.import_module(f"helmholtz.cli.{command}"), "ACTIONS", [None])
        found += [(command, *([action] if action else [])) for action in actions if command != "study"]
    for study in STUDIES:
        actions = load_study(study).actions
        found += [("study", study, action) for action in actions]
    trained = [("train", f"--model.architecture={name}") for name in MODELS]
    return [prefix for prefix in found if prefix != ("train",)] + trained


@functools.cache
def parser_of(prefix):
    """The parser of a command, taken from its ``--help``."""
    found = []
    with (
        mock.patch.object(Parser, "print_help", lambda self, *_: found.append(self)),
        pytest.raises(SystemExit),
    ):
        main([*prefix, "--help"])
    return found[0]


def options_of(prefix):
    """The names of all options and positional arguments, with their actions."""
    ours = (action for action in parser_of(prefix)._actions if action.dest.split(".")[-1] not in NOT_OURS)
    return {action.dest: action for action in ours}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Prepared text, and a finished run of each model that commands ask for."""
    folder = tmp_path_factory.mktemp("workspace")
    prepare_text(folder)
    text = [f"--data.folder={folder / 'data'}", "--data.tokenizer=bytes", "--data.validation_fraction=0.1"]
    train = ["train", *text, *SIZES, *(f"--train.{k}={v}" for k, v in RUN.items())]
    for name, more in {
        "fem_lm": ["--model.n_heads=2"],
        "free_transformer": ["--model.n_heads=2", "--model.n_layers=2", "--model.n_latent_bits=2"],
        "mamba_hopfield": ["--model.d_state=4", "--model.d_head=8", "--model.n_patterns=8"],
    }.items():
        output = f"--train.output_dir={folder / name}"
        assert main([*train, f"--model.architecture={name}", *more, output]) == 0
    return folder


def valid(prefix, workspace):
    """Arguments with which the command computes something small, by the name of the option."""
    models = {"plan": "free_transformer", "landscape": "mamba_hopfield", "validate": "mamba_hopfield"}
    run = str(workspace / models.get(prefix[0], "fem_lm"))
    wanted = {
        "checkpoint": run, "runs": run, "source": run, "folder": "out", "folders": str(workspace), "output": "out",
        "text": "to", "prompt": "to", "data.folder": str(workspace / "data"), "train.output_dir": "out",
        "data.sources": f"[{workspace / 'text.txt'}]", "data.tokenizer": "bytes",
        "data.validation_fraction": "0.1", "model.d_model": "16",
        "model.layers": "attention", "model.n_heads": "2", "model.d_state": "4",
        "model.d_head": "8", "model.n_patterns": "8", "train.seq_len": "16", "train.batch_size": "2",
        "sampling.max_new_tokens": "2",
    }  # fmt: skip
    if prefix[0] == "data":
        wanted["data.folder"] = "out"
    if prefix[0] == "validate":
        wanted = {"checkpoint": run}
    if prefix[:2] in (("study", "forecasting"), ("study", "vision")) and prefix[2] in ("list", "report"):
        wanted["data"] = "file"
    return {name: value for name, value in wanted.items() if name in options_of(prefix)}


def line(prefix, values):
    """The command line: positional arguments first, as lists may follow options."""
    actions = options_of(prefix)
    positional = [value for name, value in values.items() if not actions[name].option_strings]
    named = [
        part
        for name, value in values.items()
        if actions[name].option_strings
        for part in (
            [f"--{name}"]
            if actions[name].nargs == 0
            else [f"--{name}", value]
            if value[:1] != "-" and actions[name].nargs
            else [f"--{name}={value}"]
        )
    ]
    return [*prefix, *positional, *named]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A working directory with a file, a folder and a file that nobody may read; computing is not started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "file").write_text("a: 1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "unreadable").touch(mode=0)  # to root it is readable, and empty
    monkeypatch.setattr(torch.nn.Module, "__call__", reach)
    for name, what in LONG:
        monkeypatch.setattr(importlib.import_module(f"helmholtz.{name}"), what, reach)
    rates = dict.fromkeys(TASKS, dict.fromkeys(mad_run.PROFILES["quick"].models, 1e-3))
    monkeypatch.setattr(mad_run, "LEARNING_RATES", rates)  # as if the pilot of MAD had run
    return tmp_path


def attempt(arguments, folder, told):
    """Run a command. One that fails says so in one line, with one of the words in ``told``, and leaves nothing."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    before = snapshot(folder)
    try:
        found = call(*arguments)
    except Reached:
        return "reached"
    if found.code:
        assert any(word and word in found.err for word in told), found
        assert snapshot(folder) == before, "something is left behind"
    return found.err


SAMPLE = 1 if settings().max_examples < 1000 else len(JUNK)


@pytest.mark.parametrize("prefix", prefixes(), ids=" ".join)
def test_junk(prefix, workspace, stage):
    if prefix == ("explore",):
        pytest.importorskip("gradio", reason="no gradio, of which the command speaks first")
    base, turn = valid(prefix, workspace), itertools.cycle(JUNK)
    for name, action in options_of(prefix).items():
        for junk in itertools.islice(turn, 1 if action.nargs == 0 else SAMPLE):
            attempt(
                line(prefix, base | {name: junk}), stage, {name.split(".")[-1], junk[:50], repr(junk)[1:50]}
            )


@pytest.mark.parametrize("prefix", prefixes(), ids=" ".join)
def test_options_that_hold_paths_are_known(prefix):
    """What is said to be a file or a folder has ``~`` expanded; a new option joins by its help."""
    for name, action in options_of(prefix).items():
        said = re.match(r"(a |the |new |or )*(files?|folders?|run)\b(?! that)", (action.help or "").lower())
        assert not said or name.split(".")[-1] in PATHS, (name, action.help)
