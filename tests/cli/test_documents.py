"""YAML on the command line: files of groups, pipes, keys given twice, and nothing that runs or grows."""

import os
import subprocess
import sys
import threading

import pytest
import yaml

from helmholtz.cli import documents
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.documents import load_yaml
from helmholtz.cli.main import main
from helmholtz.cli.runs import run_parser


def values(*arguments, command="train"):
    return parse(run_parser(command, "", list(arguments)), list(arguments))


def error(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("group", "content", "name", "value"),
    [
        ("train", {"steps": 7, "lr": 1e-4}, "steps", 7),
        ("data", {"sources": ["a.txt", "b.txt"]}, "sources", ("a.txt", "b.txt")),
        ("dataset", {"path": "json"}, "path", "json"),
        ("parallel", {"strategy": "fsdp"}, "strategy", "fsdp"),
        ("objective", {"kappa_bits": 0.25}, "kappa_bits", 0.25),
        ("model", {"architecture": "free_transformer", "d_model": 48}, "d_model", 48),
        ("model.mixer", {"cap": 20.0}, "cap", 20.0),
        ("model.solver", {"max_steps": 9}, "max_steps", 9),
    ],
)
@pytest.mark.parametrize("form", ["option=FILE", "option FILE", "inline"])
def test_a_group_from_a_file(tmp_path, group, content, name, value, form):
    owner = {"model.mixer": "fem_lm", "model.solver": "mamba_hopfield"}.get(group, "free_transformer")
    first = [] if group == "model" else [f"--model.architecture={owner}"]
    file = tmp_path / "group.yaml"
    file.write_text(yaml.safe_dump(content))
    inline = yaml.safe_dump(content, default_flow_style=True)
    forms = {"option=FILE": [f"--{group}={file}"], "option FILE": [f"--{group}", str(file)]}
    found = values(*first, *forms.get(form, [f"--{group}={inline}"]))
    for part in group.split("."):
        found = found[part]
    assert found[name] == value
    assert "__path__" not in found


def test_what_comes_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 1, lr: 1e-1}")
    (tmp_path / "b.yaml").write_text("steps: 2")
    found = values(f"--config={tmp_path / 'a.yaml'}", "--train", str(tmp_path / "b.yaml"), "--train.seed=3")
    assert (found["train"]["steps"], found["train"]["lr"], found["train"]["seed"]) == (2, 0.1, 3)


def test_sampling_from_a_file(capsys, tmp_path):
    (tmp_path / "s.yaml").write_text("temprature: 0.5")
    err = error(capsys, "generate", "--checkpoint=nowhere", "--sampling", tmp_path / "s.yaml")
    assert "s.yaml: unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?" in err
    (tmp_path / "s.yaml").write_text("temperature: 0.5")
    assert "nowhere: neither" in error(
        capsys, "generate", "--checkpoint=nowhere", f"--sampling={tmp_path / 's.yaml'}"
    )


@pytest.mark.parametrize("option", ["--config", "--model"])
def test_a_pipe_is_read_once(tmp_path, option, capsys):
    """As with ``--config <(...)``; the architecture is in it, so that it is needed before the options are known."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    model = "{architecture: mamba, d_state: 4, d_modl: 3}"
    text = model if option == "--model" else f"model: {model}"
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    err = error(capsys, "train", option, pipe)
    writer.join()
    assert "unknown key 'model.d_modl'; did you mean 'model.d_model'?" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: 1\n  steps: 2\n  lr: 3\n", "key 'lr' is given twice, in line 2 and in line 4"),
        ("train: {lr: 1}\nmodel: {}\ntrain: {steps: 2}\n", "key 'train' is given twice, in line 1 and in line 3"),
        ("train: {lr: 1}\ntrain.lr: 2\n", "key 'train.lr' is given twice, nested and with dots"),
        ("train:\n- {lr: 1, lr: 2}\n", "key 'lr' is given twice, in line 2 and in line 2"),
        ("[" * 100_000, "bad.yaml: not valid YAML"),
        ("{a: " * 60 + "1" + "}" * 60, "nested at most 50 deep"),
        ("train: &a {lr: *a}\n", "bad.yaml: not valid YAML"),
        ("train: {steps: " + "9" * 5000 + "}", "bad.yaml: not valid YAML"),
        ("train: {steps: " + "9" * 30 + "}", "train.steps must be an integer of 64 bits, got 9"),
        ("train: {betas: [0.9, " + "9" * 400 + "]}", "bad.yaml: a number must have less than 300 digits"),
        ("", "wanted a mapping of names to values, got nothing"),
        ("train: {lr: fast}", "train.lr must be a number, got 'fast'"),
        ("data: {vocab_size: many}", "data.vocab_size must be an integer or null, got 'many'"),
        ("train: {betas: [1]}", "train.betas must be a list of 2: a number, a number, got '[1]'"),
        ("train: !!python/object/apply:os.system [touch ran]", "bad.yaml: not valid YAML"),
        ("train: {class_path: evil.X}", "unknown key 'train.class_path'"),
    ],
)  # fmt: skip
def test_a_bad_document_is_one_line(capsys, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in error(capsys, "train", "--config", tmp_path / "bad.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_bomb_of_aliases(capsys, tmp_path):
    rows = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    rows += [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bad.yaml").write_text("\n".join(rows))
    assert "wanted at most 100,000 values" in error(capsys, "train", "--config", tmp_path / "bad.yaml")
    inline = "{" + ", ".join(rows) + "}"
    assert "wanted at most 100,000 values" in error(capsys, "train", f"--train={inline}")


def test_aliases_and_merged_keys_are_yaml():
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nagain: *b\n"
    assert load_yaml(text) == {"base": {"x": 1, "y": 2}, "other": {"x": 1, "y": 3}, "again": {"x": 1, "y": 2}}


def test_a_file_without_an_end(capsys, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)
    assert "--config /dev/zero: not valid YAML: wanted at most 1,000" in error(
        capsys, "train", "--config=/dev/zero"
    )


VALUES = ["1e-3", "1.5", ".5", "-3", "0x1f", "1_000", "true", "null", "~", "'1e-3'", "'true'", "2026-11-30", ".inf",
          ".nan", "1e30", "abc", "'a: b'", "\"\\u2028\\x07\"", "x'y", "[1, '2', {a: '3'}]", "{}", "'<<'",
          "'='"]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_document_means_what_its_text_means(tmp_path, value):
    (tmp_path / "a.yaml").write_text(f"a: {value}\n", encoding="utf-8")
    document = documents.Document.read("--config", str(tmp_path / "a.yaml"))
    assert repr(load_yaml(document)) == repr(document.content) == repr(load_yaml(f"a: {value}"))


def test_numbers_are_those_of_yaml_1_2_and_dates_are_text():
    assert load_yaml("[1e-3, 1E3, -2.5e+1, 3., .5, 7]") == [1e-3, 1e3, -25.0, 3.0, 0.5, 7]
    assert load_yaml("[2026-11-30, e5, 1e, ., '1e3']") == ["2026-11-30", "e5", "1e", ".", "1e3"]


EVIL = "import pathlib; pathlib.Path('ran').touch()\nclass X: pass\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--parallel=evil.X"],
        ["--parallel={class_path: evil.X}"],
        ["--objective.curriculum=[evil.X]"],
        ["--objective.curriculum=[{class_path: evil.X}]"],
        ["--objective.curriculum=[{class_path: evil.X, init_args: {}}]"],
        ["--config=e.yaml"],
        ["--train=evil.X", "--dry-run"],
    ],
)
def test_no_module_of_the_current_folder_is_imported(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "e.yaml").write_text("objective: {curriculum: [{class_path: evil.X}]}")
    error(capsys, "train", "--model.architecture=mamba_hopfield", *arguments)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_started_by_its_module_python_s_current_folder_is_left_alone(tmp_path):
    """``python -m`` puts the current folder first; what is imported later is not from there."""
    (tmp_path / "jsonargparse.py").write_text(EVIL)
    command = [sys.executable, "-m", "helmholtz.cli.main", "train", "--train.lrr=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "did you mean 'train.lr'?" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_home_is_expanded_in_options_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data: {folder: ~/data, sources: [~/a.txt, b]}\ntrain: {project: ~/p}")
    found = values("--config=~/run.yaml", "--train.output_dir=~/runs/x")
    assert found["train"]["output_dir"] == f"{tmp_path}/runs/x"
    assert found["data"]["folder"] == f"{tmp_path}/data"
    assert found["data"]["sources"] == (f"{tmp_path}/a.txt", "b")
    assert found["train"]["project"] == "~/p"


def test_text_that_looks_like_null_is_text():
    parser = make_parser("generate", "")
    parser.add_argument("--prompt", type=str, default=None)
    for text in ("null", "~", "[1", "a: b", "3"):
        assert parse(parser, [f"--prompt={text}"])["prompt"] == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--checkpoint=x", "--prompt=a\udcff"], "prompt: not UTF-8 at character 1, got 'a"),
        (["train", '--config={train: {project: "a\\udcff"}}'], "train.project: not UTF-8 at character 1"),
        (["generate", "--checkpoint="], "checkpoint must be the name of a file or folder, got ''"),
        (["data", "--data.sources=['']"], "data.sources must be the name of a file or folder, got ''"),
        (["data", f"--data.seed={10**30}"], f"data.seed must be an integer of 64 bits, got {10**30}"),
    ],
)
def test_what_no_option_means_is_refused_by_name(capsys, arguments, message):
    assert message in error(capsys, *arguments)
