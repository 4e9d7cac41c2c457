"""The structure that reading relies on: import contracts, sizes, an oracle per op, light imports."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "helmholtz"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 500, 80
TOO_LONG: set[str] = set()  # may only shrink

WITHOUT_REFERENCE = {
    "bits_to_nats": "a change of unit",
    "sample_bits": "random; its test counts what it draws",
    "cross_entropy": "torch's own loss with a mask; its test states the formula",
    "head_cross_entropy": "cross_entropy of a head's logits, to which its test holds it",
    "recurrent_linear_attention": "the twin of linear_attention, held to the reference of that name",
    "plain_scan": "the plain form of first_order_scan, held to the reference of that name",
    "from_zero": "what plain_scan is made of",
    "gated": "gated_read of one head with its own gate, held to the reference of the conditioning",
    "own_gate": "part of gated_read",
    "rotate_heads": "rope of heads that lie side by side",
    "rope_table": "the angles of rope",
    "rotate": "rope with its angles given",
    "turn": "the product inside rope, held to its reference",
    "softmax_step": "rope and softmax_read of a stream; held to both",
    "attention_step": "rope and softmax_attention of a stream; held to both",
    "rotate_split": "rope of queries and keys beside values; held to rope",
    "tilt_values": "first half of free_energy_read",
    "free_energy_from_mixed": "second half of free_energy_read",
    "outer_gate": "a factor of gated_read",
    "posterior": "named free_energy_posterior in the reference",
    "pattern_scores": "first half of hopfield_weights and hopfield_potential",
    "weights_of_scores": "second half of hopfield_weights",
    "potential_of_scores": "second half of hopfield_potential",
    "retrieval_margin": "a formula; held to the median of pattern_margins over random patterns",
    "energy_components": "the summands of token_energy",
    "token_jacobian": "first half of token_jvp",
    "token_map_and_energy": "token_map and token_energy at once; held to both, bit for bit",
    "hidden_temperature": "float64 bisection already; held to the equation it solves",
}


def lint_imports(folder):
    """Exit code and output of the contracts of ``folder``, run on the sources in it."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'src'); {code}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "helmholtz", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold(copy):
    code, output = lint_imports(copy)
    assert code == 0, output
    assert "2 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("ops/scan.py", "from helmholtz import reference", "Imports point down BROKEN"),
        ("data/tokens.py", "from helmholtz import models", "Imports point down BROKEN"),
        ("evals/language.py", "from helmholtz import experiments", "Imports point down BROKEN"),
        ("experiments/queue.py", "from helmholtz import cli", "Imports point down BROKEN"),
        ("models/base.py", "import transformers", "no config parser BROKEN"),
        ("layers/mlp.py", "import jsonargparse", "no config parser BROKEN"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(copy, module, line, contract):
    path = copy / "src" / "helmholtz" / module
    path.write_text(f"{line}\n{path.read_text()}")
    code, output = lint_imports(copy)
    assert code != 0
    assert contract in output


def test_the_reference_imports_nothing_but_torch_and_itself():
    allowed = {"torch", "jaxtyping", "math", "collections", "typing", "dataclasses"}
    for path in (SOURCE / "reference").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("helmholtz.reference"), (
                    f"{path}: {name}"
                )


def _length_without_docstring(node):
    length = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_and_functions_are_short_and_annotations_live(path):
    text, name = path.read_text(), path.relative_to(SOURCE).as_posix()
    n_lines = text.count("\n")
    assert n_lines <= MAX_FILE or name in TOO_LONG, f"{name} has {n_lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _length_without_docstring(node)
            assert length <= MAX_FUNCTION or f"{name}:{node.name}" in TOO_LONG, (
                f"{node.name} has {length} lines"
            )
    assert "from __future__ import annotations" not in text, "hides the shapes in signatures"


def test_exceptions_are_still_needed():
    for entry in TOO_LONG:
        assert (SOURCE / entry.split(":")[0]).exists(), f"{entry} is gone: remove it"


def _public_functions(folder):
    return {
        node.name
        for path in folder.glob("*.py")
        if not path.stem.startswith("_") or path.stem == "__init__"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_every_public_op_has_a_reference_or_a_reason():
    ops, references = _public_functions(SOURCE / "ops"), _public_functions(SOURCE / "reference")
    missing = ops - references - set(WITHOUT_REFERENCE)
    assert not missing, f"no float64 twin of {sorted(missing)}"
    assert set(WITHOUT_REFERENCE) <= ops - references, "a reason that is no longer needed"


IMPORTS = """
import json, sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
import helmholtz, helmholtz.models
end = time.process_time()
import helmholtz.data, helmholtz.training
print(json.dumps({"relative_cost": (end - middle) / (middle - start), "loaded": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def fresh():
    """What importing the library costs and loads in a new interpreter, after torch."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_library_loads_no_optional_package(fresh):
    optional = {
        "transformers",
        "jsonargparse",
        "triton",
        "matplotlib",
        "tensorboard",
        "tokenizers",
        "datasets",
    }
    assert not optional & set(fresh["loaded"])


def test_importing_the_models_costs_little_beside_torch(fresh):
    assert fresh["relative_cost"] < 0.5


def test_evals_train_nothing():
    """What trains models of its own is an experiment."""
    for file in (SOURCE / "evals").glob("*.py"):
        names = {
            node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not names & {"optim", "backward", "zero_grad"}, file.name
