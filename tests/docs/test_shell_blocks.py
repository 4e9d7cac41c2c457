"""The shell blocks of the README and of "Getting started" run as written, but at tiny sizes.

A command of helmholtz gets the options of ``TINY`` appended and its numbers of steps divided by 100, and what it prints
goes to nobody. What installs, builds or runs for minutes is looked up instead: targets of make, extras, files.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from helmholtz.cli.main import COMMANDS, main
from tiny_runs import write_text

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/getting-started.md")
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DATA = ("--data.sources=[text.txt]", "--data.tokenizer=bytes", "--data.validation_fraction=0.1")
STEPS = 100
"""Of which a tiny run makes one."""
TINY = {
    "data": DATA,
    "train": (
        *DATA,
        "--model.d_model=16",
        "--model.n_layers=2",
        "--model.max_seq_len=64",
        "--train.batch_size=2",
        "--train.seq_len=16",
        "--train.warmup_steps=1",
        "--train.eval_every=2",
        "--train.eval_tokens=64",
        "--train.save_every=2",
        "--train.threads=1",
    ),
    "evaluate": ("--n_windows=2", "--n_samples=2"),
    "compare": (),
    "generate": ("--sampling.max_new_tokens=4",),
    "plan": ("--sampling.max_new_tokens=4", "--n_samples=2", "--n_plans=2"),
    "validate": ("--batch=1", "--time=4", "--threads=1"),
    "landscape": ("--resolution=5", "--threads=1"),
}
ARCHITECTURES = {
    "mamba_hopfield": ("--model.d_state=4", "--model.d_head=8", "--model.n_patterns=9"),
    "free_transformer": ("--model.n_heads=2", "--model.n_latent_bits=3"),
    "fem_lm": ("--model.n_heads=2",),
    "transformer": ("--model.n_heads=2",),
}


def commands_of(page):
    """The commands of all blocks, in order, as lists of words, without comments."""
    text = "".join(BLOCK.findall((ROOT / page).read_text())).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def tiny(arguments):
    """A command of helmholtz at the sizes of a test."""
    command, *options = arguments
    for place, (name, value) in enumerate(zip(options, options[1:], strict=False)):
        if name == "--train.steps":
            assert int(value) % STEPS == 0
            options[place + 1] = str(int(value) // STEPS)
        elif name == "--model.architecture":
            options = [*options, *ARCHITECTURES[value]]
    return [command, *options, *TINY[command]]


def check_installation(words):
    """Whether what is installed or built is there."""
    program, *rest = words
    if program == "make":
        assert set(rest) <= TARGETS, words
    elif words[:2] == ["pip", "install"]:
        names = re.findall(r"^\.\[([\w,]+)\]$|^helmholtz-nn\[([\w,]+)\]$", rest[-1])
        extras = {extra for pair in names for extra in ",".join(pair).split(",") if extra}
        assert extras <= set(EXTRAS), words
        for name, file in zip(rest, rest[1:], strict=False):
            assert name != "-r" or (ROOT / file).exists(), words
    else:
        assert words == ["source", ".venv/bin/activate"], f"{words}: neither run nor looked up by this test"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt", n_words=1600)
    commands = commands_of(page)
    assert commands
    for words in commands:
        if words[0] != "helmholtz":
            check_installation(words)
        elif words[1:] == ["kernels", "build"]:  # compiles for a minute
            assert main(["kernels"]) == 0
        else:
            pytest.importorskip("matplotlib")
            code = main(tiny(words[1:]))
            captured = capsys.readouterr()
            # four steps do not make a plan or an equilibrium: validate may find a check that fails
            assert code in ((0, 1) if words[1] == "validate" else (0,)), (words, captured.err)


def test_the_rule_leaves_what_a_command_says():
    options = ["--model.architecture", "fem_lm", "--train.steps", "300", "--train.resume", "auto"]
    found = tiny(["train", *options])
    assert found[:7] == ["train", *(word.replace("300", "3") for word in options)]
    assert found[7:] == [*ARCHITECTURES["fem_lm"], *TINY["train"]]
    assert set(TINY) <= set(COMMANDS)
    with pytest.raises(AssertionError, match="neither run nor looked up"):
        check_installation(["curl", "somewhere"])


def listed(text):
    """Paths in the README's tree, folders ending in /."""
    block = re.search(r"## What is where\n\n```\n(.*?)```", text, re.DOTALL)[1]
    found, folder = [], ""
    for line in block.splitlines():
        indent, name = re.match(r"( *)([^\s,]*(?:, [^\s,]+)*)", line).groups()
        if not indent:
            folder = name if name.endswith("/") else ""
            found.append(name)
        elif len(indent) == 2:
            found += [folder + part for part in name.split(", ")]
    return found


def test_the_tree_of_the_readme_is_complete():
    found = listed((ROOT / "README.md").read_text())
    for name in found:
        assert (ROOT / name).exists(), name
    package = ROOT / "src" / "helmholtz"
    rooms = {
        file.parent.relative_to(package).as_posix() + "/"
        for file in package.glob("*/__init__.py")
        if not file.parent.name.startswith("_")
    }
    inside = {name.removeprefix("src/helmholtz/") for name in found if name.startswith("src/helmholtz/")}
    inside = {name.split("/")[0] + "/" for name in inside if name}
    assert rooms == inside - {"csrc/"}, "packages in the tree"
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a clone: git does not say what belongs to the repository")
    top = {re.sub("/.*", "/", name) for name in git.stdout.splitlines() if not name.startswith(".")}
    assert top - {re.sub("/.*", "/", name) for name in found} <= SPEAK_FOR_THEMSELVES


SPEAK_FOR_THEMSELVES = {
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "compose.yaml",
    "mkdocs.yml",
    "requirements.txt",
}
