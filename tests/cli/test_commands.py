import io
import json
import os
import shlex
import subprocess
import sys
from codecs import BOM_UTF8

import pytest
import yaml

from helmholtz.cli import data as data_command
from helmholtz.cli.main import main
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokenizer import load_tokenizer
from tiny_runs import write_text


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A prepared text, a YAML file that describes a run on it, and the finished run."""
    folder = tmp_path_factory.mktemp("workspace")
    config = {
        "data": {
            "folder": str(folder / "data"),
            "sources": [str(write_text(folder / "text.txt"))],
            "vocab_size": 300,
            "validation_fraction": 0.1,
        },
        "model": {"architecture": "fem_lm", "prior": ["softmax", "gla"], "d_model": 32, "n_layers": 2, "n_heads": 2,
                  "max_seq_len": 64, "mixer": {"cap": 30.0}},
        "train": {"output_dir": str(folder / "run"), "steps": 4, "batch_size": 2, "seq_len": 16, "warmup_steps": 1,
                  "eval_every": 2, "save_every": 2, "eval_tokens": 100},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["data", f"--config={folder / 'run.yaml'}"]) == 0
    assert main(["train", f"--config={folder / 'run.yaml'}"]) == 0
    return folder


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_run_is_what_the_file_describes(workspace):
    run = json.loads((workspace / "run" / "run.json").read_text())["identity"]
    assert run["architecture"] == "fem_lm"
    assert run["model"]["prior"] == ["softmax", "gla"]
    assert run["model"]["mixer"]["cap"] == 30.0
    assert run["model"]["vocab_size"] == 300
    assert run["train"]["steps"] == 4
    assert (workspace / "run" / "best" / "tokenizer" / "tokenizer.json").exists()


def test_train_without_an_option_is_the_run_of_the_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "train")[0::2] == (
        2,
        "helmholtz train: error: 'data/shakespeare' is no folder of prepared text (metadata.json is missing): "
        "make it with helmholtz data\n",
    )


def test_data_without_an_option_is_the_demo_corpus(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare, asked = data_command.prepare, []

    def prepare_small(config, **options):
        asked.append(config)
        data = yaml.safe_load((workspace / "run.yaml").read_text())["data"]
        return prepare(DataConfig(**data | {"sources": tuple(data["sources"])}), **options)

    monkeypatch.setattr(data_command, "prepare", prepare_small)
    code, out, err = call(capsys, "data")
    assert (code, err, asked) == (0, "", [DataConfig()])
    assert "already there, vocabulary 300" in out


def test_what_cannot_be_generated_is_told_before_the_prompt_is_shown(workspace, capsys):
    settings = ["--prompt=To be", "--sampling.max_new_tokens=100000"]
    code, out, err = call(capsys, "generate", "--checkpoint", workspace / "run", *settings)
    assert (code, out) == (2, "")
    assert "exceed max_seq_len=64" in err


def test_data_prepared_before_is_reused(workspace, capsys):
    code, out, _ = call(capsys, "data", "--config", workspace / "run.yaml")
    assert code == 0
    assert "already there, vocabulary 300" in out


def test_overrides_on_the_command_line_win(workspace, capsys, tmp_path):
    code, out, _ = call(
        capsys, "train", "--config", workspace / "run.yaml", f"--train.output_dir={tmp_path / 'other'}",
        "--train.lr=3e-4", "--model.d_model=64", "--model.mixer.cap=20",
    )  # fmt: skip
    assert code == 0
    run = json.loads((tmp_path / "other" / "run.json").read_text())["identity"]
    assert (run["train"]["lr"], run["model"]["d_model"], run["model"]["mixer"]["cap"]) == (3e-4, 64, 20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lrr=1"], "unknown option --train.lrr; did you mean 'train.lr'?"),
        (["--train.d_model=1"], "unknown option --train.d_model; did you mean 'model.d_model'?"),
        (["--train.lr=fast"], "train.lr must be a number, got 'fast'"),
        (["--train.steps=1.5"], "train.steps must be an integer, got '1.5'"),
        (["--train.precision=bf15"], "train.precision must be one of fp32, bf16, fp16, got 'bf15'"),
        (["--train.lr=-1"], "train.lr must be a finite number above 0, got -1.0"),
        (["--model.architecture=fem"], "did you mean 'fem_lm'?"),
        (["--model.n_heads=3"], "n_heads must divide d_model, got n_heads=3 and d_model=32"),
        (["--model.prior=[softmax]"], "prior: 1 names for n_layers=2 layers"),
        (["--train.seq_len=65"], "train.seq_len must be at most model.max_seq_len = 64, got 65"),
        (["--data.folder=nowhere"], "nowhere"),
        (["--config=nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        ([], "already holds a run; go on with --train.resume=auto"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(workspace, capsys, arguments, message):
    before = {file: file.read_bytes() for file in workspace.rglob("*") if file.is_file()}
    code, out, err = call(capsys, "train", "--config", workspace / "run.yaml", *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("helmholtz train: error: ")
    assert err.count("\n") == 1
    assert before == {file: file.read_bytes() for file in workspace.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {lrr: 1}", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("model: {architecture: transformer, prior: gla}", "unknown key 'model.prior'"),
        ("trian: {lr: 1}", "unknown key 'trian'; did you mean 'train'?"),
        ("model: {architecture: transfomer}", "did you mean 'transformer'?"),
        ("train: [1", "bad.yaml: not valid YAML"),
        ("a: !!timestamp 2026-13-40", "bad.yaml: not valid YAML: month must be in 1..12"),
        ("[" * 5000, "bad.yaml: not valid YAML"),
        (b"train: \xff", "bad.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xff in position 7"),
        ("3", "wanted a mapping of names to values, got int"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(capsys, tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    code, _, err = call(capsys, "train", "--config", file)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_help_shows_the_documentation_of_every_setting(capsys):
    for command, text in [
        ("train", "Gradients are scaled down to this 2-norm over all parameters."),
        ("generate", "Divides the logits; 0 takes the likeliest token."),
        ("data", "Raw bytes, or a byte-level BPE trained on the training split."),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert text in " ".join(capsys.readouterr().out.split())


def test_an_unknown_command_suggests_one(capsys):
    code, _, err = call(capsys, "trian")
    assert code == 2
    assert "did you mean 'train'?" in err
    assert call(capsys, "--help")[0] == 0
    assert call(capsys)[0] == 2


def test_evaluate_agrees_with_itself_as_json(workspace, capsys):
    arguments = ["evaluate", f"--checkpoint={workspace / 'run'}", f"--data={workspace / 'data'}"]
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert 1 < result["bits_per_byte"] < 12
    code, out, _ = call(capsys, *arguments)
    assert f"{result['bits_per_byte']:.4f}" in out


def test_evaluate_takes_the_text_of_the_run_unless_told_otherwise(workspace, capsys):
    run, data = workspace / "run", workspace / "data"
    code, without, _ = call(capsys, "evaluate", f"--checkpoint={run}", "--json")
    _, named, _ = call(capsys, "evaluate", f"--checkpoint={run}", f"--data={data}", "--json")
    assert code == 0 and json.loads(without)["bits_per_byte"] == json.loads(named)["bits_per_byte"]
    code, _, err = call(capsys, "evaluate", f"--checkpoint={run / 'best'}")
    assert code == 2 and "name a folder with --data" in err


def test_evaluate_refuses_text_of_another_tokenizer(workspace, capsys, tmp_path):
    source = workspace / "text.txt"
    other = tmp_path / "bytes"
    assert (
        main(["data", f"--data.folder={other}", f"--data.sources=[{source}]", "--data.tokenizer=bytes"]) == 0
    )
    capsys.readouterr()
    code, _, err = call(capsys, "evaluate", f"--checkpoint={workspace / 'run'}", f"--data={other}")
    assert code == 2
    assert "is not the one the model was trained with" in err


def test_generate_continues_a_prompt_reproducibly(workspace, capsys):
    arguments = [
        "generate",
        f"--checkpoint={workspace / 'run'}",
        "--prompt=the king",
        "--sampling.max_new_tokens=12",
    ]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert out.startswith("the king")
    assert len(out) > len("the king") + 4
    assert call(capsys, *arguments)[1] == out
    assert call(capsys, *arguments, "--sampling.seed=1")[1] != out


def test_generate_reads_standard_input_in_its_own_process(workspace):
    command = [sys.executable, "-m", "helmholtz.cli.main", "generate", f"--checkpoint={workspace / 'run'}"]
    result = subprocess.run(
        [*command, "--sampling.max_new_tokens=5"], input="love and war", capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    assert result.stdout.startswith("love and war")
    assert result.stderr == ""


@pytest.mark.parametrize("given", [b"love\r\nand \xc3\xbc", BOM_UTF8 + b"love\r\nand \xc3\xbc"])
def test_generate_reads_the_bytes_of_standard_input(workspace, capsys, monkeypatch, given):
    prompts = []
    monkeypatch.setattr("helmholtz.cli.generate.generate", lambda model, rows, *_, **__: prompts.extend(rows))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    assert call(capsys, "generate", f"--checkpoint={workspace / 'run'}")[0] == 0
    tokenizer = load_tokenizer(workspace / "run" / "best" / "tokenizer")
    assert prompts == [[tokenizer.eos_id, *tokenizer.encode("love\r\nand \u00fc")]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"ab\xff", "standard input: not UTF-8 at byte 2"),
        ("ab\udcff", "prompt: not UTF-8 at character 2, got"),
    ],
)
def test_generate_names_what_is_no_text(workspace, capsys, monkeypatch, prompt, message):
    arguments = ["generate", f"--checkpoint={workspace / 'run'}"]
    if isinstance(prompt, str):  # what Python makes of such an argument
        arguments.append(f"--prompt={prompt}")
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_generate_refuses_a_folder_without_a_checkpoint(capsys, tmp_path):
    code, _, err = call(capsys, "generate", f"--checkpoint={tmp_path}", "--prompt=x")
    assert code == 2
    assert "neither a checkpoint (config.json) nor a run that has one" in err


def test_an_interrupted_run_says_how_to_go_on(workspace, capsys, tmp_path, monkeypatch):
    from helmholtz.training.loop import Trainer

    make_step = Trainer.make_step

    def stopped(self):
        make_step(self)
        if self.steps_made == 3:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(Trainer, "make_step", stopped)
    arguments = ["--config", str(workspace / "run.yaml"), f"--train.output_dir={tmp_path / 'a name'}"]
    code, out, _ = call(capsys, "train", *arguments)
    assert code == 130
    said, command = out.strip().split("go on with\n")
    assert "stopped after step 3 and saved" in said
    monkeypatch.undo()
    assert command.startswith("helmholtz train --config ") and command.endswith(" --train.resume=auto")
    code, out, _ = call(capsys, *shlex.split(command)[1:])
    assert code == 0
    assert "finished 4 steps" in out


def test_compare_writes_a_table_results_and_curves(workspace, capsys, tmp_path):
    assert (
        main(
            [
                "train",
                f"--config={workspace / 'run.yaml'}",
                f"--train.output_dir={tmp_path / 'two'}",
                "--train.seed=1",
            ]
        )
        == 0
    )
    capsys.readouterr()
    code, out, _ = call(
        capsys, "compare", "--runs", workspace / "run", tmp_path / "two", f"--output={tmp_path / 'out'}"
    )
    assert code == 0
    assert "over seeds 0, 1" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["run", "two"]
    assert {"commit", "hardware", "date", "groups", "runs"} <= results.keys()
    assert (tmp_path / "out" / "loss.png").stat().st_size > 5000


def test_compare_refuses_unequal_budgets(workspace, capsys, tmp_path):
    changes = ["--model.d_model=48", "--train.steps=5"]
    assert (
        main(
            [
                "train",
                f"--config={workspace / 'run.yaml'}",
                f"--train.output_dir={tmp_path / 'big'}",
                *changes,
            ]
        )
        == 0
    )
    capsys.readouterr()
    arguments = ["compare", "--runs", workspace / "run", tmp_path / "big", f"--output={tmp_path / 'out'}"]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    for part in (
        "cannot be compared fairly",
        "parameters differ by more than 2%",
        "train.steps is 5 in big and 4 in run",
        "tokens",
    ):
        assert part in err
    assert not (tmp_path / "out").exists()
    code, out, _ = call(capsys, *arguments, "--allow_unequal")
    assert code == 0
    assert "UNEQUAL" in out
    assert "unequal: parameters differ" in out


def test_inspect_shows_parameters_temperatures_and_the_reading_of_a_text(workspace, capsys, tmp_path):
    arguments = ["inspect", f"--checkpoint={workspace / 'run'}"]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    for part in ("blocks.1.mixer", "total", "of the baseline block's", "beta mean", "1.95"):
        assert part in out
    picture = tmp_path / "selection.png"
    text = "--text=the king shall speak of war"
    code, out, _ = call(capsys, *arguments, text, f"--picture={picture}")
    assert code == 0
    assert "Reading: tokens read (effective)" in out
    assert picture.stat().st_size > 5000
    assert call(capsys, *arguments, f"--picture={picture}")[0] == 2


def test_a_mamba_model_goes_through_every_command(workspace, capsys, tmp_path):
    """Without heads and a feed-forward: trained, read, written, measured, compared."""
    run = tmp_path / "run"
    settings = yaml.safe_load((workspace / "run.yaml").read_text())
    settings["model"] = {"architecture": "mamba", "d_model": 32, "n_layers": 2, "d_state": 8, "d_head": 16}
    settings["train"]["output_dir"] = str(run)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert call(capsys, "train", f"--config={tmp_path / 'run.yaml'}")[0] == 0
    code, out, _ = call(capsys, "inspect", "--checkpoint", run)
    assert code == 0
    assert "blocks.1.mixer" in out and "blocks.1.mlp" not in out
    assert "of the baseline block's 12,544" in out  # 4 D^2 + 3 D 88
    code, out, _ = call(capsys, "generate", "--checkpoint", run, "--prompt=the king")
    assert code == 0
    code, out, _ = call(capsys, "evaluate", "--checkpoint", run, "--data", workspace / "data")
    assert code == 0
    code, out, _ = call(capsys, "compare", "--runs", run, workspace / "run", "--output", tmp_path / "table")
    assert code == 0
    assert "mamba" in out and "fem_lm" in out
