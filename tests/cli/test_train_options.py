"""What ``helmholtz train`` does before and beside a run."""

import os
import re
import signal
from pathlib import Path

import pytest

from helmholtz.cli.main import main
from helmholtz.training.loop import Trainer
from tiny_runs import prepare_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def train(data, folder, *options):
    sizes = ["--model.d_model=16", "--model.n_layers=1", "--model.n_heads=2", "--model.max_seq_len=32"]
    text = [f"--data.folder={data.folder}", f"--data.sources=['{data.sources[0]}']", "--data.tokenizer=bytes"]
    text += ["--data.validation_fraction=0.1", "--model.architecture=transformer"]
    steps = ["--train.steps=7", "--train.warmup_steps=2", "--train.seq_len=16", "--train.batch_size=2"]
    steps += ["--train.accumulation=2", "--train.eval_tokens=64", f"--train.output_dir={folder}"]
    return main(["train", *text, *sizes, *steps, *options])


def test_a_dry_run_counts_and_shows_but_trains_and_writes_nothing(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--dry-run", "--parallel.strategy=fsdp") == 0
    said = capsys.readouterr().out
    numbers = dict(re.findall(r"│ ([\w ']+?) +│ +([\d,.]+)", said))
    d, vocabulary, d_ff = 16, 257, 48
    parameters = vocabulary * d + 4 * d * d + 3 * d * d_ff + 3 * d
    assert numbers["parameters"] == numbers["of these trained"] == f"{parameters:,}"
    assert (numbers["tokens per step"], numbers["tokens in all"]) == ("64", "448")
    per_token = 3 * 2 * (4 * d * d + 3 * d * d_ff + vocabulary * d)  # without attention's own products
    assert 64 * per_token / 1e9 < float(numbers["products per step"]) < 1.5 * 64 * per_token / 1e9
    shown = said.split("begins with\n")[1].removesuffix("\n")
    assert len(shown) == 17
    assert shown in Path(data.sources[0]).read_text(), "a window of the text, decoded"
    assert not (tmp_path / "run").exists()


def test_profile_writes_a_trace_and_a_table(data, tmp_path):
    assert train(data, tmp_path / "run", "--profile") == 0
    assert {path.name for path in (tmp_path / "run" / "profile").iterdir()} == {"trace.json", "table.txt"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--parallel.strategy=fsdp",
            "parallel.strategy must be ddp in a process that torchrun has not started",
        ),
        ("--parallel.replicas=2", "parallel.replicas must be 1 without parallel.strategy=fsdp"),
        ("--train.keep=0", "train.keep must be an integer of at least 1, got 0"),
        ("--train.max_skipped=-1", "train.max_skipped must be an integer of at least 0, got -1"),
        ("--train.project=", "train.project must be a name"),
    ],
)
def test_settings_that_cannot_be_are_named(data, tmp_path, capsys, option, message):
    assert train(data, tmp_path / "run", option) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["open_data", "_model", "check_free_space"])
def test_ctrl_c_before_the_first_step_is_one_line_and_leaves_nothing(
    data, tmp_path, capsys, monkeypatch, where
):
    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(f"helmholtz.training.run.{where}", interrupt)
    assert train(data, tmp_path / "run") == 130
    said = capsys.readouterr().err
    assert said == "helmholtz train: interrupted\n"
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_ends_a_run_at_once_in_one_line_and_keeps_its_checkpoint(
    data, tmp_path, capsys, monkeypatch
):
    make_step = Trainer.make_step

    def interrupted_twice(trainer):
        if trainer.progress.step == 5:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        make_step(trainer)

    monkeypatch.setattr(Trainer, "make_step", interrupted_twice)
    assert train(data, tmp_path / "run", "--train.save_every=4") == 130
    assert capsys.readouterr().err == "helmholtz train: interrupted\n"
    assert (tmp_path / "run" / "last").resolve().name == "step-00000004"


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(data, tmp_path, capsys):
    for option, message in [
        ("--model.n_layers=1000000", "n_layers must be at most 10,000, got 1000000"),
        (
            "--model.d_model=1000000",
            r"model: 13,0\d\d,\d{3},\d{3},\d{3}|model: 12,0\d\d,\d{3},\d{3},\d{3} parameters",
        ),
    ]:
        assert train(data, tmp_path / "run", option) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "run" / "last").exists()


def test_text_that_was_not_prepared_is_refused_with_the_command_that_does(tmp_path, capsys):
    assert main(["train", f"--data.folder={tmp_path}"]) == 2
    assert "make it with helmholtz data" in capsys.readouterr().err


def options(folder, **settings):
    return [f"--train.{name}={value}" for name, value in (settings | {"output_dir": folder}).items()]


def test_it_says_how_a_run_begins_and_a_dry_run_says_it_before(data, tmp_path, capsys):
    assert train(data, tmp_path / "a") == 0
    assert "the run" not in capsys.readouterr().out.splitlines()[0], "a new one needs no words"
    longer = {"steps": 14, "resume": "auto"}
    ways = {
        "a": (
            longer,
            "the run goes on from {}/a/step-00000007 with train.steps 7 -> 14; the learning rate, 0.0003",
        ),
        "b": (
            {"init_from": tmp_path / "a"},
            "the run begins at step 0 with the weights of {}/a/best after step 7",
        ),
        "c": (
            {"continue_from": tmp_path / "a", "steps": 12, "lr": 0.001},
            "the run goes on from {}/a/step-00000007 with train.lr 0.003 -> 0.001, train.steps 7 -> 12; the",
        ),
    }
    for name, (settings, said) in reversed(ways.items()):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert train(data, tmp_path / name, *options(tmp_path / name, **settings), "--dry-run") == 0
        planned = capsys.readouterr().out.splitlines()
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert train(data, tmp_path / name, *options(tmp_path / name, **settings)) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert planned[0].startswith(first) and first.startswith(said.format(tmp_path))
    assert planned[0].endswith("; the counts are of the 7 steps to come")
    assert any("tokens in all" in line and "448" in line for line in planned)
    assert train(data, tmp_path / "a", *options(tmp_path / "a", **longer), "--dry-run") == 0
    said = capsys.readouterr().out
    assert said == "the run has ended, at step 14; to go on, raise train.steps\n"


def test_a_dry_run_refuses_what_training_would(data, tmp_path, capsys):
    assert train(data, tmp_path / "a") == 0
    for wrong, message in [
        ([], "already holds a run; go on with --train.resume=auto"),
        (
            options(tmp_path / "b", init_from=tmp_path / "none"),
            "train.init_from: .*none is neither a checkpoint",
        ),
    ]:
        assert train(data, tmp_path / "a", *wrong, "--dry-run") == 2
        assert re.search(message, capsys.readouterr().err)
