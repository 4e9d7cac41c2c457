"""A run goes on with more steps, in another folder with other settings, or begins with the weights of another."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from distributed_cases import assert_equal_runs, records
from helmholtz._files import sha256
from helmholtz.data.prepare import DataConfig
from helmholtz.data.prepare import prepare as prepare_data
from helmholtz.data.tokens import TokenDataset
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.training.callbacks import Callback
from helmholtz.training.config import TrainConfig
from helmholtz.training.optim import learning_rate
from helmholtz.training.order import window_starts
from helmholtz.training.run import planned_start, train
from tiny_runs import prepare_text, tiny_run, write_text

CONSTANT = {"warmup_steps": 2, "min_lr_ratio": 1.0, "eval_every": 3, "save_every": 2}
"""A learning rate that does not ask how many steps there are."""


class Crash(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise ConnectionError("the machine is gone")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another text in the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    source = write_text(folder / "text.txt", 5000)
    config = DataConfig(
        folder=str(folder / "data"), sources=(str(source),), tokenizer="bytes", validation_fraction=0.1
    )
    prepare_data(config)
    return config


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of 6 steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(data, folder, steps=6, **CONSTANT))
    return folder


@pytest.fixture(scope="module")
def longer(data, tmp_path_factory):
    """The folder of an uninterrupted run of 12."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    train(tiny_run(data, folder, steps=12, **CONSTANT))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def description(folder):
    return json.loads((folder / "run.json").read_text())["identity"]


def history(folder):
    return description(folder)["history"]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raised(data, folder, **changes):
    return train(tiny_run(data, folder, **CONSTANT | {"steps": 12, "resume": "auto"} | changes))


def test_a_finished_run_with_more_steps_is_the_longer_run_to_the_bit(data, copy, finished, longer):
    assert raised(data, copy).step == 12
    assert_equal_runs(copy, longer)
    (event,) = history(copy)
    assert (event["how"], event["step"], event["changed"]) == ("resume", 6, {"train.steps": [6, 12]})
    assert event["lr"] == [0.003, 0.003]
    weights = finished / "step-00000006" / "model.safetensors"
    assert event["weights"] == {"model.safetensors": sha256(weights)}
    assert description(copy) | {"history": None} == description(longer) | {"history": None}
    assert "history" not in description(longer)


def test_interrupted_in_its_new_steps_it_goes_on_exactly(data, copy, longer):
    for crash in (7, 11):  # before and after the first checkpoint of the new steps
        with pytest.raises(ConnectionError):
            train(tiny_run(data, copy, **CONSTANT, steps=12, resume="auto"), callbacks=[Crash(crash)])
        assert json.loads((copy / "summary.json").read_text())["status"] != "finished"
    (copy / "run.json").unlink()  # its checkpoints know it too
    raised(data, copy)
    assert_equal_runs(copy, longer)
    assert [event["step"] for event in history(copy)] == [6]


def test_it_can_be_raised_again_and_never_lowered(data, copy):
    raised(data, copy, steps=8)
    with pytest.raises(ValueError, match="train.steps was 8, now 6; give it 8 or more"):
        raised(data, copy, steps=6)
    raised(data, copy, steps=10)
    assert [event["changed"]["train.steps"] for event in history(copy)] == [[6, 8], [8, 10]]
    assert [record["step"] for record in records(copy, "step")] == list(range(1, 11))


def test_a_cosine_is_that_of_all_steps_and_it_says_so(data, tmp_path):
    settings = {"eval_every": 6, "save_every": 6, "warmup_steps": 2}
    train(tiny_run(data, tmp_path, steps=6, **settings))
    longer = tiny_run(data, tmp_path, steps=12, resume="auto", **settings)
    said = planned_start(longer).said
    train(longer)
    rates = [record["lr"] for record in records(tmp_path, "step")]
    assert rates[5] == learning_rate(5, replace(longer.train, steps=6)) == pytest.approx(0.0003)
    assert rates[6:] == [learning_rate(step, longer.train) for step in range(6, 12)]
    assert history(tmp_path)[0]["lr"] == rates[5:7]
    assert said.startswith(
        f"goes on from {tmp_path / 'step-00000006'} with train.steps 6 -> 12; the learning"
    )
    assert said.endswith(
        "0.0003 in step 6, is 0.001884 in step 7 and 0.0003 at the end, as in a run of 12 steps"
    )


def test_the_steps_of_a_run_that_has_not_ended_are_not_raised(data, tmp_path):
    with pytest.raises(ConnectionError):
        train(tiny_run(data, tmp_path, steps=6, **CONSTANT), callbacks=[Crash(5)])
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="has not ended: train.steps was 6, now 12; go on to step 6 first"):
        raised(data, tmp_path)
    assert snapshot(tmp_path) == before


def test_checkpoints_of_a_shorter_run_that_was_another_are_refused(data, copy, longer):
    folder = copy.parent / "longer"
    shutil.copytree(longer, folder, symlinks=True)
    shutil.copytree(copy / "step-00000006", folder / "step-00000006")
    with pytest.raises(
        ValueError, match="step-00000006 is a checkpoint of a different run: train.steps was 6"
    ):
        raised(data, folder)


def test_a_damaged_end_is_raised_from_the_checkpoint_before_it(data, copy):
    (copy / "step-00000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged.*set aside"):
        raised(data, copy)
    assert history(copy)[0]["step"] == 4


def test_other_settings_are_refused_in_the_folder_and_the_way_is_named(data, copy):
    before = snapshot(copy)
    with pytest.raises(
        ValueError, match=r"train.lr was 0.003, now 0.1; --train.continue_from=.*run goes on with"
    ):
        raised(data, copy, lr=0.1)
    assert snapshot(copy) == before


def continued(data, source, folder, **changes):
    return tiny_run(data, folder, **CONSTANT | {"steps": 12, "continue_from": str(source)} | changes)


def test_a_run_continued_in_another_folder_is_the_uninterrupted_one(data, finished, longer, tmp_path):
    before = snapshot(finished)
    train(continued(data, finished, tmp_path / "new"))
    assert snapshot(finished) == before
    assert records(tmp_path / "new", "step") == records(longer, "step")[6:]
    one, two = (load_checkpoint(folder / "last").state_dict() for folder in (longer, tmp_path / "new"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert (tmp_path / "new" / "best").is_dir()


@pytest.mark.parametrize("crash", [7, 9])
def test_interrupted_a_continued_run_goes_on_exactly(data, finished, tmp_path, crash):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(continued(data, finished, whole, lr=0.001))
    with pytest.raises(ConnectionError):
        train(continued(data, finished, broken, lr=0.001), callbacks=[Crash(crash)])
    train(continued(data, finished, broken, lr=0.001, resume="auto"))  # the same command, and resume
    assert_equal_runs(whole, broken)
    assert description(whole) == description(broken)
    (event,) = history(broken)
    assert event["changed"] == {"train.lr": [0.003, 0.001], "train.steps": [6, 12]}
    assert (event["from"], event["step"]) == (str(finished), 6)
    assert event["checkpoint"] == str(finished / "step-00000006")


def test_records_that_are_rare_are_not_missed_where_a_run_was_continued(data, finished, tmp_path):
    with pytest.raises(ConnectionError):
        train(continued(data, finished, tmp_path / "new", log_every=5), callbacks=[Crash(9)])
    train(continued(data, finished, tmp_path / "new", log_every=5, resume="auto", continue_from=None))
    assert [record["step"] for record in records(tmp_path / "new", "step")] == [10]


def test_another_text_is_read_from_its_beginning_and_tokens_count_on(data, other, finished, tmp_path):
    seen = []

    class Windows(Callback):
        def on_step(self, record):
            seen.append(record.tokens)

    run = continued(other, finished, tmp_path / "new", lr=0.001)
    with pytest.raises(ConnectionError):
        train(run, callbacks=[Windows(), Crash(9)])
    assert seen == [(step * 4) * 16 for step in (7, 8, 9)]
    train(replace(run, train=replace(run.train, resume="auto", continue_from=None)))
    state = json.loads((tmp_path / "new" / "last" / "training_state.json").read_text())["progress"]
    assert (state["windows"], state["windows_before"]) == (48, 24)
    changed = history(tmp_path / "new")[0]["changed"]
    assert changed.keys() == {"data.fingerprint", "train.lr", "train.steps"}
    whole = tmp_path / "whole"
    train(replace(run, train=replace(run.train, output_dir=str(whole))))
    assert_equal_runs(whole, tmp_path / "new")


def test_the_new_text_begins_with_its_first_window(data, other, finished, tmp_path, monkeypatch):
    from helmholtz.training import batches

    asked = []

    def starts(first, count, **settings):
        asked.append(first)
        return window_starts(first, count, **settings)

    monkeypatch.setattr(batches, "window_starts", starts)
    train(continued(other, finished, tmp_path / "new", steps=7))
    assert asked == [0, 0, 2]  # the first looks whether there is a window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"train.continue_from: train.seed was 0 .*, now 1, and cannot change within a run.*init_from="),
        ({"seq_len": 8}, r"train.seq_len was 16 .*, now 8"),
        ({"steps": 6}, r"train.steps must be more than 6, the steps of .*step-00000006, got 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_named_and_leaves_no_trace(data, finished, tmp_path, changes, message):
    for look in (train, planned_start):
        with pytest.raises(ValueError, match=message):
            look(continued(data, finished, tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_only_a_state_can_be_continued(data, finished, tmp_path):
    for source in (tmp_path, finished / "best"):
        with pytest.raises(ValueError, match="is neither a run with a whole checkpoint"):
            train(continued(data, source, tmp_path / "new"))
    for source in (finished / "last", finished / "step-00000006", finished / "step-00000004"):
        start = planned_start(continued(data, source, tmp_path / "new"))
        assert start.progress.step == int(start.checkpoint.name[-1])


def test_a_model_that_changed_cannot_be_continued(data, finished, tmp_path):
    run = continued(data, finished, tmp_path / "new")
    with pytest.raises(ValueError, match="model.n_layers was 1 in the run of .*, now 2, and cannot change"):
        train(replace(run, model=replace(run.model, n_layers=2)))


def begun(data, source, folder, **changes):
    return tiny_run(data, folder, **{"steps": 6, "save_every": 2, "init_from": str(source)} | changes)


def test_a_run_begins_with_the_weights_of_another(data, finished, tmp_path):
    assert train(begun(data, finished, tmp_path / "new", lr=1e-30, weight_decay=0.0)).step == 6
    one, two = (
        load_checkpoint(folder).state_dict() for folder in (finished / "best", tmp_path / "new" / "last")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0)
    (event,) = history(tmp_path / "new")
    assert (event["how"], event["from"]) == ("init_from", str(finished))
    assert event["checkpoint"] == str(finished / "best")
    best = [record["step"] for record in records(finished, "eval") if record["best"]]
    assert event["step"] == best[-1]
    assert event["weights"]["model.safetensors"] == sha256(finished / "best" / "model.safetensors")
    assert event["changed"]["train.lr"] == [0.003, 1e-30]
    assert records(tmp_path / "new", "step")[0]["tokens"] == 64, "from step 0"


@pytest.mark.parametrize("crash", [1, 3])
def test_interrupted_it_goes_on_exactly_and_needs_its_source_only_before_the_first_checkpoint(
    data, copy, tmp_path, crash
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(begun(data, copy, whole))
    with pytest.raises(ConnectionError):
        train(begun(data, copy, broken), callbacks=[Crash(crash)])
    without = begun(data, copy, broken, init_from=None, resume="auto")
    if crash == 1:
        with pytest.raises(
            ValueError, match="no checkpoint yet and was begun with train.init_from=.*give that"
        ):
            train(without)
        train(begun(data, copy, broken, resume="auto"))
    else:
        shutil.rmtree(copy)
        train(without)
    assert_equal_runs(whole, broken)
    assert description(whole) == description(broken)


def test_a_run_that_was_begun_otherwise_is_refused(data, finished, copy, tmp_path):
    with pytest.raises(
        ValueError, match=r"train.init_from must be as it was .*\(with new weights\), or absent"
    ):
        raised(data, copy, init_from=str(finished))
    train(begun(data, finished, tmp_path / "new"))
    for changes in ({"init_from": str(copy)}, {"init_from": None, "continue_from": str(finished)}):
        with pytest.raises(ValueError, match=r"\(with train.init_from=.*\), or absent"):
            train(begun(data, finished, tmp_path / "new", resume="auto", **changes))
    with pytest.raises(ValueError, match="already holds a run"):
        train(begun(data, finished, tmp_path / "new"))


def test_weights_of_another_model_are_refused_and_every_field_named(data, finished, tmp_path):
    run = begun(data, finished, tmp_path / "new")
    wider = replace(run, model=replace(run.model, n_layers=2, norm_eps=1e-5))
    with pytest.raises(
        ValueError, match=r"n_layers was 1, now 2; model.norm_eps was 1e-06, now 1e-05\); give the"
    ):
        train(wider)
    fem = FEMLMConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
    with pytest.raises(ValueError, match="model.architecture was 'transformer', now 'fem_lm'"):
        train(replace(run, architecture="fem_lm", model=fem))
    assert not (tmp_path / "new").exists()


def test_weights_of_another_tokenizer_are_refused(data, finished, tmp_path):
    folder = tmp_path / "bare"
    save_checkpoint(load_checkpoint(finished / "best"), folder)
    run = begun(data, folder, tmp_path / "new")
    with pytest.raises(ValueError, match="bare has no tokenizer/, so nothing says whether its ids are those"):
        train(run)
    shutil.copytree(TokenDataset(data.folder, "train").tokenizer_folder, folder / "tokenizer")
    (folder / "tokenizer" / "kind.json").write_text('{"kind": "ids", "n_ids": 256}\n')
    with pytest.raises(ValueError, match="is not the one the model was trained with"):
        train(run)
    (folder / "tokenizer" / "kind.json").write_text('{"kind": "bytes"}\n')
    assert train(run).status == "finished"
    assert history(tmp_path / "new")[0]["changed"] is None, "nobody knows what they were trained on"


def test_nothing_to_begin_with_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="train.init_from: .*nowhere is neither a checkpoint"):
        train(begun(data, tmp_path / "nowhere", tmp_path / "new"))
    with pytest.raises(ValueError, match="train.init_from must be absent beside train.continue_from"):
        TrainConfig(init_from="a", continue_from="b")


def test_a_new_folder_has_a_best_of_its_own_though_it_is_worse(data, finished, tmp_path):
    train(continued(data, finished, tmp_path / "new", lr=20.0, steps=9))
    first, before = records(tmp_path / "new", "eval")[0], records(finished, "eval")[-1]
    assert first["validation_loss"] > before["validation_loss"] and first["best"]
    assert (tmp_path / "new" / "best").is_dir()


def test_a_continued_run_has_the_lengths_of_its_own_folder_only(data, copy, tmp_path):
    raised(data, copy, steps=8)
    train(continued(data, copy, tmp_path / "new"))
    assert [event["how"] for event in history(tmp_path / "new")] == ["resume", "continue_from"]
    shutil.copytree(copy / "step-00000006", tmp_path / "new" / "step-00000006")
    with pytest.raises(
        ValueError, match="step-00000006 is a checkpoint of a different run: train.steps was 6"
    ):
        raised(data, tmp_path / "new")
