"""Which checkpoints a run keeps, and which one it goes on from."""

import json
import os

import pytest
from safetensors import SafetensorError

from helmholtz._files import write_checksums
from helmholtz.models import checkpoint
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.checkpoint import newest_checkpoint
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def steps(folder):
    return sorted(int(path.name[5:13]) for path in folder.glob("step-*"))


@pytest.mark.parametrize(("keep", "kept"), [(1, [12]), (3, [6, 9, 12]), (9, [3, 6, 9, 12])])
def test_the_newest_checkpoints_are_kept_and_last_is_the_newest(data, tmp_path, keep, kept):
    train(tiny_run(data, tmp_path, steps=12, save_every=3, keep=keep))
    assert steps(tmp_path) == kept
    assert (tmp_path / "last").resolve().name == "step-00000012"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "last", "metrics.jsonl", "run.json", "summary.json", ".owner"} | {
        f"step-{step:08d}" for step in kept
    }


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gives_the_same_run(data, tmp_path):
    for name in ("whole", "damaged"):
        train(tiny_run(data, tmp_path / name, steps=12, save_every=3, keep=3))
    folder = tmp_path / "damaged"
    os.truncate(folder / "last" / "optimizer" / os.listdir(folder / "last" / "optimizer")[0], 100)
    (folder / "step-00000009" / "training_state.json").unlink()
    with pytest.warns(UserWarning, match="set aside as step-000000(09|12).damaged") as warned:
        train(tiny_run(data, folder, steps=12, save_every=3, keep=3, resume="auto"))
    assert len(warned) == 2
    assert (folder / "step-00000012.damaged").is_dir()
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "damaged"))
    assert [json.loads(a).get("loss") for a in one] == [json.loads(a).get("loss") for a in two]


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_keeps_them(data, tmp_path):
    train(tiny_run(data, tmp_path, steps=6, save_every=3))
    for path in tmp_path.glob("step-*"):
        (path / "config.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="config.json is damaged"),
        pytest.raises(
            ValueError,
            match=r"train.resume: every checkpoint of .* is damaged \(step-00000006, step-00000003\)",
        ),
    ):
        train(tiny_run(data, tmp_path, steps=6, save_every=3, resume="auto"))
    assert steps(tmp_path) == [3, 6]


def test_one_that_was_being_written_once_more_is_the_newest_again(data, tmp_path):
    """A signal at a step that was saved: killed between its two renames, the checkpoint is in a hidden folder."""
    train(tiny_run(data, tmp_path, steps=6, save_every=3, keep=1))
    newest = tmp_path / "step-00000006"
    newest.rename(tmp_path / ".step-00000006.previous")
    assert newest_checkpoint(tmp_path, pytest.fail) == newest
    assert [path.name for path in tmp_path.glob("*step*")] == [newest.name]


def test_there_may_be_none_yet(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing", pytest.fail) is None


def test_a_flipped_bit_in_the_weights_is_refused_by_every_reader(data, tmp_path):
    train(tiny_run(data, tmp_path, steps=4))
    file = tmp_path / "best" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: it is not what was written"):
        load_checkpoint(tmp_path / "best")


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"identity": ', "Expecting value.*"), ("[]", "no mapping with 'identity'"), ("{}", "no mapping with 'identity'"),
     ("null", "no mapping with 'identity'")],
)  # fmt: skip
def test_a_damaged_description_of_the_run_is_named(content, reason, data, tmp_path):
    train(tiny_run(data, tmp_path, steps=4))
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run.json is damaged \({reason}\); name another train.output_dir"):
        train(tiny_run(data, tmp_path, steps=4, resume="auto"))


def test_a_failed_write_ends_the_run_with_the_last_checkpoint(data, tmp_path, monkeypatch):
    real = checkpoint.save_file
    calls = iter([False, False, True])  # best at 5 comes after last at 4: the third write fails

    def full(tensors, file, metadata=None):
        if next(calls):
            raise SafetensorError("No space left on device")
        real(tensors, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        OSError, match=r"step 8: saving .*last failed .*No space left.* kept in .*step-00000004"
    ):
        train(tiny_run(data, tmp_path))
    assert steps(tmp_path) == [4]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("updates", {"norm.weight": "many"}),
        ("updates", 3),
        ("random", {}),
        ("progress", {"best": None, "odd": 1}),
    ],
)
def test_a_training_state_that_says_something_else_is_named(data, tmp_path, key, value):
    train(tiny_run(data, tmp_path, steps=4))
    file = tmp_path / "last" / "training_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    write_checksums(file.parent)
    with pytest.raises(ValueError, match=r"training_state.json: damaged"):
        train(tiny_run(data, tmp_path, steps=4, resume="auto"))
