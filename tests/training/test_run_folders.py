"""What has become of a run's folder: copied, moved, mixed with another's, on a disk without links or locks."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace

import pytest

from helmholtz._files import write_checksums
from helmholtz.data.tokenizer import BPETokenizer, load_tokenizer
from helmholtz.evals.runs import find_checkpoint
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.callbacks import Callback, JSONLMetrics, StepRecord
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run

SETTINGS = {"steps": 8, "save_every": 2, "eval_every": 3}


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, record):
        if record.step == self.step:
            self.action()


def crash():
    raise ConnectionError("the machine is gone")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_run(data, folder, **SETTINGS))
    return folder


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """The same run after a crash in step 5: checkpoints of steps 2 and 4, the best one of step 3."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(ConnectionError):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[AtStep(5, crash)])
    return folder


@pytest.fixture
def copy(broken, tmp_path):
    """A copy of the broken run that keeps its link."""
    shutil.copytree(broken, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def resume(data, folder, **changes):
    return train(tiny_run(data, folder, **SETTINGS | {"resume": "auto"} | changes))


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_identity(folder, identity):
    """Make a checkpoint say that it is of another run; None takes the word away."""
    file = folder / "training_state.json"
    values = json.loads(file.read_text())
    del values["identity"]
    file.write_text(json.dumps(values if identity is None else values | {"identity": identity}))
    write_checksums(folder)


def remove_steps(folder):
    for path in folder.glob("step-*"):
        shutil.rmtree(path)


def damage_newest(folder):
    os.truncate(folder / "step-00000004" / "model.safetensors", 100)


def damage_last(folder):
    os.truncate(folder / "last" / "model.safetensors", 100)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda folder: None, None),
        (remove_steps, None),
        (damage_newest, "step-00000004/model.safetensors is damaged.*aside as step-00000004.damaged"),
        (damage_last, "last/model.safetensors is damaged.*aside as last.damaged"),
    ],
)
def test_a_copy_that_resolved_links_goes_on_to_the_bit(data, broken, whole, tmp_path, change, warning):
    folder = tmp_path / "run"
    shutil.copytree(broken, folder)
    assert (folder / "last").is_dir() and not (folder / "last").is_symlink()
    change(folder)
    if warning is None:
        resume(data, folder)
    else:
        with pytest.warns(UserWarning, match=warning):
            resume(data, folder)
    assert records(folder) == records(whole)
    assert (folder / "last").is_symlink() and (folder / "last").resolve().name == "step-00000008"
    kept = {path.name for path in folder.glob("step-*") if not path.name.endswith(".damaged")}
    assert kept == {"step-00000006", "step-00000008"}


def test_a_copy_without_the_link_goes_on(data, copy, whole):
    (copy / "last").unlink()
    resume(data, copy)
    assert records(copy) == records(whole)


def test_a_run_that_is_moved_while_it_trains_stops_and_goes_on_there(data, whole, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    move = AtStep(5, lambda: folder.rename(moved))
    with pytest.raises(OSError, match=r"run was moved or removed .* go on with --train.resume=auto"):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[move])
    assert not folder.exists(), "no second half"
    resume(data, moved)
    assert records(moved) == records(whole)


def test_a_run_that_is_removed_while_it_trains_stops_and_leaves_nothing(data, tmp_path):
    folder = tmp_path / "run"
    remove = AtStep(5, lambda: shutil.rmtree(folder))
    with pytest.raises(OSError, match="moved or removed"):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[remove])
    assert not folder.exists()


@pytest.mark.parametrize("step", [3, 8])
def test_a_move_just_before_a_save_is_noticed_by_it(data, tmp_path, step):
    """After the step was noted: in its evaluation, or when the last one has ended."""
    folder = tmp_path / "run"

    class Mover(Callback):
        def on_eval(self, record):
            if record.step == step:
                folder.rename(tmp_path / "moved")

    with pytest.raises(OSError, match="moved or removed"):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[Mover()])
    assert not folder.exists()


def test_who_trains_in_a_folder_that_became_anothers_writes_nothing_there(data, tmp_path):
    folder = tmp_path / "run"

    def replace_folder():
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / "theirs").touch()

    with pytest.raises(OSError, match="moved or removed"):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[AtStep(3, replace_folder)])
    assert [path.name for path in folder.iterdir()] == ["theirs"]


def test_every_callback_is_told_of_the_end_of_a_lost_run(data, tmp_path):
    told = []

    class End(Callback):
        def on_end(self, result):
            told.append(result.status)

    remove = AtStep(2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(OSError, match="moved or removed"):
        train(tiny_run(data, tmp_path / "run", **SETTINGS), callbacks=[remove, End()])
    assert told == ["failed"]


@pytest.mark.parametrize("described", [True, False])
def test_checkpoints_of_another_run_are_refused_and_nothing_is_touched(data, copy, tmp_path, described):
    other = tmp_path / "other"
    train(tiny_run(data, other, **SETTINGS, lr=0.01))
    remove_steps(copy)
    for path in other.glob("step-*"):
        shutil.copytree(path, copy / path.name)
    if not described:
        (copy / "run.json").unlink()
    before = snapshot(copy)
    message = "step-00000006 is a checkpoint of a different run: train.lr was 0.01, now 0.003"
    with pytest.raises(ValueError, match=message):
        resume(data, copy)
    with pytest.raises(ValueError, match="already holds a run"):
        resume(data, copy, resume="never")
    assert snapshot(copy) == before


def test_checkpoints_that_know_their_run_need_no_description_of_it(data, copy, whole):
    (copy / "run.json").unlink()
    resume(data, copy)
    assert records(copy) == records(whole)
    assert (copy / "run.json").read_text() == (whole / "run.json").read_text()


def test_older_checkpoints_do_not_know_their_run(data, copy, whole):
    for path in copy.glob("step-*"):
        change_identity(path, None)
    (copy / "run.json").rename(copy / "aside.json")
    before = snapshot(copy)
    with pytest.raises(ValueError, match=r"step-00000002, step-00000004 of a run, but no run.json that says"):
        resume(data, copy)
    assert snapshot(copy) == before
    (copy / "aside.json").rename(copy / "run.json")
    resume(data, copy)
    assert records(copy) == records(whole)


def test_a_checkpoint_of_another_model_that_does_not_know_its_run_is_refused(data, copy, tmp_path):
    run = tiny_run(data, tmp_path / "other", **SETTINGS)
    train(replace(run, model=replace(run.model, n_layers=2)))
    change_identity(tmp_path / "other" / "step-00000006", None)
    (tmp_path / "other" / "step-00000006").rename(copy / "step-00000006")
    with pytest.raises(
        ValueError, match=r"step-00000006 holds another model .*\(model.n_layers was 2, now 1\)"
    ):
        resume(data, copy)


@pytest.mark.parametrize("left", ["best", "metrics.jsonl", "summary.json"])
def test_what_is_left_of_a_run_is_not_written_over(data, copy, left):
    for path in copy.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path) if path.name != left else None
        elif path.name != left:
            path.unlink()
    before = snapshot(copy)
    for value in ("never", "auto"):
        with pytest.raises(ValueError, match=r"already holds a run|but no run.json"):
            resume(data, copy, resume=value)
    assert snapshot(copy) == before


def damage_all(folder):
    for path in folder.glob("step-*"):
        os.truncate(path / "model.safetensors", 100)


def set_aside(folder):
    """As versions before left it, which renamed the last whole one as well."""
    for path in folder.glob("step-*"):
        path.rename(path.with_name(path.name + ".damaged"))
    (folder / "last").unlink()


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            damage_all,
            r"every checkpoint of .* is damaged \(step-00000004, step-00000002\); put a whole one back",
        ),
        (set_aside, r"is damaged \(step-00000002.damaged, step-00000004.damaged\)"),
        (remove_steps, "the checkpoints of .* are gone"),
    ],
)
def test_a_run_whose_checkpoints_are_lost_never_starts_anew(data, copy, change, message):
    change(copy)
    before = snapshot(copy)
    for _ in range(3):
        with pytest.raises(ValueError, match=message):
            resume(data, copy)
    assert snapshot(copy) == before


def test_a_finished_run_whose_checkpoints_are_gone_never_starts_anew(data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    remove_steps(folder)
    (folder / "last").unlink()
    with pytest.raises(ValueError, match="are gone"):
        resume(data, folder)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_checkpoint_that_is_mended_is_gone_on_from(data, copy, whole):
    files = {path: (path / "model.safetensors").read_bytes() for path in copy.glob("step-*")}
    damage_all(copy)
    with pytest.raises(ValueError, match="put a whole one back from a copy"):
        resume(data, copy)
    for path, content in files.items():
        (path / "model.safetensors").write_bytes(content)
    resume(data, copy)
    assert records(copy) == records(whole)


def test_a_run_that_crashed_before_its_first_checkpoint_begins_again(data, whole, tmp_path):
    settings = SETTINGS | {"save_every": 6}
    with pytest.raises(ConnectionError):
        train(tiny_run(data, tmp_path, **settings), callbacks=[AtStep(4, crash)])
    assert (tmp_path / "best").exists() and not (tmp_path / "last").exists()
    resume(data, tmp_path, save_every=6)
    assert records(tmp_path) == records(whole)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_disk_without_links_and_locks(data, whole, tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    def no_flock(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    folder = tmp_path / "run"
    with pytest.raises(ConnectionError):
        train(tiny_run(data, folder, **SETTINGS), callbacks=[AtStep(5, crash)])
    resume(data, folder)
    assert records(folder) == records(whole)
    assert (folder / "last").read_text() == "step-00000008"
    found = find_checkpoint(folder / "last")
    assert load_tokenizer(found / "tokenizer").vocab_size == 257
    assert not (folder / ".owner.lock").exists()
    one, two = load_checkpoint(found).state_dict(), load_checkpoint(whole / "last").state_dict()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


def test_a_run_that_came_to_a_disk_with_links_has_one_again(data, copy, whole):
    (copy / "last").unlink()
    (copy / "last").write_text("step-00000004")
    resume(data, copy)
    assert (copy / "last").is_symlink()
    assert records(copy) == records(whole)


def test_a_checkpoint_that_others_have_open_does_not_end_the_run_that_removes_it(
    data, whole, tmp_path, monkeypatch
):
    """NFS keeps an open file under another name, and its folder cannot be removed before it is closed."""
    real, opened = os.rmdir, [".best.", "step-00000002"]

    def rmdir(path, *, dir_fd=None):
        inside = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        if any(name in f"{inside}/{path}" for name in opened):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    folder = tmp_path / "run"
    close, settings = AtStep(7, opened.clear), SETTINGS | {"eval_every": 2}
    assert train(tiny_run(data, folder, **settings), callbacks=[close]).status == "finished"
    steps = [[line for line in records(run) if line["kind"] == "step"] for run in (folder, whole)]
    assert steps[0] == steps[1]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_prepared_text_may_be_moved_while_it_is_trained_on(data, whole, tmp_path):
    text = tmp_path / "data"
    shutil.copytree(data.folder, text)
    moved = AtStep(1, lambda: text.rename(tmp_path / "elsewhere"))
    config = tiny_run(replace(data, folder=str(text)), tmp_path / "run", **SETTINGS)
    assert train(config, callbacks=[moved]).status == "finished"
    assert records(tmp_path / "run") == records(whole)
    kind = (tmp_path / "run" / "last" / "tokenizer" / "kind.json").read_bytes()
    assert kind == (whole / "last" / "tokenizer" / "kind.json").read_bytes()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_missing_tokenizer_is_noticed_before_anything_is_written(data, tmp_path, kind):
    text, name = tmp_path / "data", "kind.json"
    shutil.copytree(data.folder, text)
    if kind == "bpe":
        name = "tokenizer.json"
        BPETokenizer.train(["to be or not to be"], 258).save(text / "tokenizer")
        (text / "checksums.json").unlink()  # as in text that was prepared before there were any
    (text / "tokenizer" / name).unlink()
    config = tiny_run(replace(data, folder=str(text)), tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match=f"tokenizer/{name}"):
        train(config)
    assert not (tmp_path / "run").exists()


def record(step):
    return StepRecord(
        step=step, tokens=1, loss=1.0, bits_per_byte=1.0, grad_norm=1.0, lr=1.0, tokens_per_second=1.0
    )


def test_a_disk_that_fills_up_within_a_record_is_an_error(tmp_path):
    """The system writes what fits and says how much; only the next write fails."""
    metrics = JSONLMetrics(tmp_path / "metrics.jsonl", start=0, log_every=1)
    metrics.on_step(record(1))
    metrics.file.close()

    class Full:
        room = 20

        def write(self, content):
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            n, self.room = self.room, 0
            return n

    metrics.file = Full()
    with pytest.raises(OSError, match=r"No space left on device: .*metrics.jsonl"):
        metrics.on_step(record(2))
