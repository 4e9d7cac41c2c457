"""Whatever has happened to a folder of tokens, a checkpoint or a run: a result that is still true, or one line."""

import json
import shutil
import struct
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzzing import call, changed, damaged, examples, snapshot
from helmholtz._files import CHECKSUMS, write_checksums
from helmholtz.cli.main import main
from tiny_runs import prepare_text

pytestmark = pytest.mark.fuzz

SAFE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**6, 10**9, 10**18, 10**30]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
MODEL = ["--model.architecture=transformer", "--model.d_model=16", "--model.n_layers=1", "--model.n_heads=2",
         "--model.max_seq_len=16", "--data.tokenizer=bytes", "--data.validation_fraction=0.1"]  # fmt: skip
TRAIN = {
    "steps": 2,
    "batch_size": 2,
    "seq_len": 16,
    "warmup_steps": 1,
    "eval_every": 2,
    "eval_tokens": 64,
    "threads": 1,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with prepared text and a finished run on it."""
    folder = tmp_path_factory.mktemp("original")
    prepare_text(folder)
    train = [f"--train.{name}={value}" for name, value in TRAIN.items()]
    assert main(["train", f"--data.folder={folder / 'data'}", *MODEL, *train,
                 f"--train.output_dir={folder / 'run'}"]) == 0  # fmt: skip
    return folder


def commands(folder):
    """What reads which part of the workspace."""
    run, data = folder / "run", folder / "data"
    return {
        "generate": ["generate", f"--checkpoint={run}", "--prompt=to", "--sampling.max_new_tokens=2"],
        "evaluate": ["evaluate", f"--checkpoint={run}", f"--data={data}", "--json"],
        "inspect": ["inspect", f"--checkpoint={run / 'best'}"],
        "compare": ["compare", "--runs", str(run), f"--output={folder / 'out'}"],
        "resume": ["train", f"--data.folder={data}", *MODEL, "--train.resume=auto",
                   *(f"--train.{name}={value}" for name, value in TRAIN.items()), f"--train.output_dir={run}"],
    }  # fmt: skip


def files_of(folder, part):
    return sorted(path.relative_to(folder) for path in (folder / part).rglob("*") if path.is_file())


def check(folder, name, *, read_only=True):
    """Run a command; one that fails changes nothing, and one that only reads never does."""
    before = snapshot(folder)
    with (
        mock.patch("helmholtz.cli.compare.plot_loss_curves"),
        mock.patch("helmholtz.evals.compare.decode_tokens_per_second", return_value=1.0),
    ):  # slow, and beside the point
        found = call(*commands(folder)[name])
    after = snapshot(folder)
    if found.code or read_only:
        # a resumption sets a damaged checkpoint aside; .owner says who reads or writes
        named = {Path(str(path).replace(".damaged", "")): content for path, content in after.items()}
        both = before.keys() | named.keys()
        changed_files = {path for path in both if before.get(path) != named.get(path)}
        assert {path.name for path in changed_files} <= {".owner"}, (changed_files, found)
    return found


def copy_of(original, target):
    folder = Path(target) / "w"
    shutil.copytree(original, folder, symlinks=True)
    return folder


@pytest.mark.parametrize("name", ["generate", "evaluate", "inspect", "compare", "resume"])
def test_undamaged(original, tmp_path, name):
    assert check(copy_of(original, tmp_path), name, read_only=False).code == 0


def spoil(draw, folder, files):
    """Damage one file, remove it, put a folder in its place, or exchange two."""
    path = folder / draw(st.sampled_from(files))
    what = draw(st.sampled_from(["damage", "damage", "damage", "remove", "folder", "exchange"]))
    if what == "damage":
        path.write_bytes(draw(damaged(path.read_bytes())))
        return
    other = folder / draw(st.sampled_from(files))
    content = path.read_bytes()
    if what == "exchange":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return
    path.unlink()
    if what == "folder":
        path.mkdir()


@examples(0.3)
@given(st.data())
def test_a_damaged_folder_of_tokens(original, draw):
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        spoil(draw.draw, folder, files_of(folder, "data"))
        check(folder, "evaluate")
        check(folder, draw.draw(st.sampled_from(["generate", "compare", "resume"])), read_only=False)


@examples(0.3)
@given(st.data())
def test_a_damaged_checkpoint(original, draw):
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        spoil(draw.draw, folder, files_of(folder, "run/best"))
        for name in draw.draw(
            st.sampled_from([("generate",), ("evaluate", "inspect"), ("inspect", "generate")])
        ):
            check(folder, name)


@examples(0.3)
@given(st.data())
def test_a_damaged_run(original, draw):
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        files = [path for path in files_of(folder, "run") if path.parts[1] != "best"]
        spoil(draw.draw, folder, files)
        check(folder, draw.draw(st.sampled_from(["compare", "resume", "evaluate"])), read_only=False)


@examples(0.3)
@given(st.data())
def test_json_that_says_something_else(original, draw):
    """Valid JSON with values that are wrong, in any of the files that describe something."""
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        others = ("checksums.json", "training_state.json")
        files = [path for path in files_of(folder, ".") if path.suffix == ".json" and path.name not in others]
        path = folder / draw.draw(st.sampled_from(files))
        content = json.loads(path.read_text())
        path.write_text(json.dumps(draw.draw(changed(content, SAFE) if isinstance(content, dict) else SAFE)))
        _renew_checksums(path)
        for name in draw.draw(st.lists(st.sampled_from(list(commands(folder))), min_size=1, max_size=2)):
            check(folder, name, read_only=False)


def _renew_checksums(path):
    """As if the file had been written like that."""
    for folder in path.parents:
        if (folder / CHECKSUMS).exists():
            write_checksums(folder)


@st.composite
def tensors(draw, found):
    """The tensors of a checkpoint with one of another shape, type or name, or missing, or one too many."""
    result, name = dict(found), draw(st.sampled_from(sorted(found)))
    tensor = result[name]
    changes = {
        "shape": lambda: tensor[:-1].contiguous(),
        "rank": lambda: tensor.unsqueeze(0).contiguous(),
        "integer": lambda: tensor.int(),
        "half": lambda: tensor.bfloat16(),
        "empty": lambda: tensor.flatten()[:0],
    }
    what = draw(st.sampled_from([*changes, "missing", "renamed", "more"]))
    if what in changes:
        result[name] = changes[what]()
    elif what == "more":
        result[draw(st.text(min_size=1, max_size=5))] = tensor.clone()
    else:
        del result[name]
        if what == "renamed":
            result[f"{name}.x"] = tensor
    return result


@examples(0.2)
@given(st.data())
def test_tensors_that_do_not_fit(original, draw):
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        path = folder / "run" / "best" / "model.safetensors"
        content = draw.draw(tensors(load_file(path)))
        save_file(content, path)
        _renew_checksums(path)
        found = check(folder, "generate")
        assert found.code == 2, found


@examples(0.2)
@given(st.integers(0, 2**64 - 1), st.binary(max_size=40))
def test_a_header_of_any_length(original, n, rest):
    with tempfile.TemporaryDirectory() as target:
        folder = copy_of(original, target)
        path = folder / "run" / "best" / "model.safetensors"
        path.write_bytes(struct.pack("<Q", n) + rest)
        _renew_checksums(path)
        assert check(folder, "generate").code == 2
