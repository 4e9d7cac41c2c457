"""The notebooks of ``examples/`` run, cell by cell, and what ends a cell shows itself."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
WIDGETS = {"mixer_in_your_model": ["Reading"], "plans_and_memories": ["ReadPlan", "Plan", "Equilibrium"]}
"""Types of the values that a notebook shows, in order."""
TRAINING = re.compile(r"(?<=for step in )range\(\d+\)")


def source_of(cell):
    return "".join(cell["source"])


def run(source, names):
    """The value of the last expression, as a notebook would show it; None if there is none."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_its_objects_show_themselves(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [source_of(c) for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    assert sum(len(TRAINING.findall(cell)) for cell in cells) == 1
    names, shown = {"__name__": "__main__"}, []
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        for cell in cells:
            value = run(TRAINING.sub("range(3)", cell), names)  # not the whole training
            if hasattr(value, "_repr_html_"):
                shown.append(value)
    assert [type(value).__name__ for value in shown] == WIDGETS[file.stem]
    assert all('class="hz-table"' in value._repr_html_() for value in shown)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_outputs(file):
    content = json.loads(file.read_text())
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            for name in source_of(cell).split("`")[1::2]:
                if name.startswith("docs/"):
                    assert (ROOT / name).exists(), name


def test_every_notebook_is_known():
    assert {file.stem for file in NOTEBOOKS} == set(WIDGETS)
