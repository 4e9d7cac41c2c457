import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed_cases import python_path
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.runs import Run
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.models.transformer import Transformer
from helmholtz.training import run as run_module
from helmholtz.training.callbacks import Callback, JSONLMetrics
from helmholtz.training.diagnosis import NonFiniteError, first_non_finite
from helmholtz.training.loop import Trainer
from helmholtz.training.objectives import Objective, Report, learned, next_token
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def metrics(folder):
    """Every record without its timing."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


def weights(folder):
    return load_checkpoint(folder).state_dict()


def trainer(data, tmp_path, objective=next_token, report=learned, **changes):
    run = tiny_run(data, tmp_path, **changes)
    torch.manual_seed(0)
    splits = TokenDataset(data.folder, "train"), TokenDataset(data.folder, "validation")
    return Trainer(
        Transformer(replace(run.model, dropout=0.0)), *splits, run.train, objective=objective, report=report
    )


class Crash(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise ConnectionError("the machine is gone")


class Record(Callback):
    def __init__(self):
        self.events, self.evaluations = [], []

    def on_step(self, record):
        self.events.append(("step", record.step))

    def on_eval(self, record):
        self.events.append(("eval", record.step))
        self.evaluations.append(record)

    def on_checkpoint(self, folder, step):
        self.events.append((folder.name, step))

    def on_end(self, result):
        self.events.append((result.status, result.step))


def test_training_learns_the_text(data, tmp_path):
    result = train(tiny_run(data, tmp_path, steps=60, lr=1e-2, eval_every=20))
    assert result.status == "finished"
    assert result.tokens == 60 * 2 * 2 * 16
    first, *_, last = [record for record in metrics(tmp_path) if record["kind"] == "step"]
    assert first["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert last["loss"] < 0.6 * first["loss"]
    assert last["bits_per_byte"] == pytest.approx(
        last["loss"] / math.log(2), rel=0.01
    )  # bytes are the tokens
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 60, result.tokens)
    assert (
        summary["parameters"]
        == sum(tensor.numel() for tensor in weights(tmp_path / "last").values()) - 257 * 16
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("crash", [2, 11, 16])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(data, tmp_path, precision, crash):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_run(data, whole, precision=precision))
    with pytest.raises(ConnectionError):
        train(tiny_run(data, broken, precision=precision), callbacks=[Crash(crash)])
    torch.manual_seed(99)
    train(tiny_run(data, broken, precision=precision, resume="auto"))
    assert metrics(broken) == metrics(whole)
    for name, tensor in weights(whole / "last").items():
        assert torch.equal(tensor, weights(broken / "last")[name]), name
        assert torch.equal(weights(whole / "best")[name], weights(broken / "best")[name]), name


PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from helmholtz.data.prepare import DataConfig
    from helmholtz.training.callbacks import Callback
    from helmholtz.training.run import train
    from tiny_runs import tiny_run

    class Kill(Callback):
        def on_step(self, record):
            if record.step == int(sys.argv[3]):
                os.kill(os.getpid(), int(sys.argv[4]))

    data = DataConfig(folder=sys.argv[1], tokenizer="bytes", validation_fraction=0.1)
    result = train(tiny_run(data, Path(sys.argv[2])), callbacks=[Kill()])
    assert result.status == "interrupted"
"""


def run_and_kill(data, output, step, number):
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(PROGRAM),
        data.folder,
        str(output),
        str(step),
        str(int(number)),
    ]
    return subprocess.run(command, env=environment).returncode


def test_a_killed_process_can_be_resumed(data, tmp_path):
    train(tiny_run(data, tmp_path / "whole"))
    assert run_and_kill(data, tmp_path / "killed", 14, signal.SIGKILL) == -signal.SIGKILL
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{}\n7\n{"kind": "step", "st')  # a line cut off by the kill, after two that say nothing
    train(tiny_run(data, tmp_path / "killed", resume="auto"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(data, tmp_path, number, heard_hangups):
    class Signal(Callback):
        def on_step(self, record):
            if record.step == 7:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = train(tiny_run(data, tmp_path / "stopped"), callbacks=[Signal()])
    assert (result.status, result.step) == ("interrupted", 7)
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "interrupted"
    train(tiny_run(data, tmp_path / "whole"))
    assert train(tiny_run(data, tmp_path / "stopped", resume="auto")).status == "finished"
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(data, tmp_path, name):
    train(tiny_run(data, tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = (tmp_path / "run.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=f"{name} is a folder, wanted a file"):
        train(tiny_run(data, tmp_path, resume="auto"))
    assert (tmp_path / "run.json").stat().st_mtime_ns == before


def test_a_second_run_into_a_folder_is_refused_and_nothing_is_lost(data, tmp_path):
    train(tiny_run(data, tmp_path))
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="already holds a run; go on with --train.resume=auto"):
        train(tiny_run(data, tmp_path))
    with pytest.raises(ValueError, match="holds a different run: train.lr was 0.003, now 0.1"):
        train(tiny_run(data, tmp_path, lr=0.1, resume="auto"))
    with pytest.raises(
        ValueError, match=r"was prepared with other settings \(data.validation_fraction was 0.1, now 0.2\)"
    ):
        train(tiny_run(replace(data, validation_fraction=0.2), tmp_path, resume="auto"))
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_run_that_another_process_begins_just_before_is_refused(data, tmp_path, monkeypatch):
    lock = run_module.lock_folder
    train(tiny_run(data, tmp_path / "other"))

    @contextlib.contextmanager
    def late(folder):
        shutil.copytree(tmp_path / "other", folder)
        with lock(folder):
            yield

    monkeypatch.setattr(run_module, "lock_folder", late)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_run(data, tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "other")


def test_going_on_with_a_finished_run_changes_nothing(data, tmp_path):
    train(tiny_run(data, tmp_path))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert train(tiny_run(data, tmp_path, resume="auto")).status == "finished"
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_accumulated_gradients_equal_those_of_the_big_batch(data, tmp_path):
    small, big = trainer(data, tmp_path), trainer(data, tmp_path, accumulation=1, batch_size=4)
    one, two = small.step(), big.step()
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5)
    assert one.tokens == two.tokens
    for (name, p), q in zip(small.model.named_parameters(), big.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_gradient_is_clipped(data, tmp_path):
    loop = trainer(data, tmp_path, clip_norm=0.01)
    assert loop.step().grad_norm > 0.01
    norm = torch.stack([p.grad.norm() for p in loop.model.parameters()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_callbacks_are_called_in_order(data, tmp_path):
    events = Record()
    train(tiny_run(data, tmp_path, steps=6, eval_every=2, save_every=3, lr=1e-4), callbacks=[events])
    best = (
        ("best", 2),
        ("best", 4),
        ("best", 6),
    )  # at a small learning rate each evaluation is the best so far
    assert events.events == [
        ("step", 1), ("step", 2), ("eval", 2), best[0],
        ("step", 3), ("last", 3), ("step", 4), ("eval", 4), best[1],
        ("step", 5), ("step", 6), ("eval", 6), best[2], ("last", 6), ("finished", 6),
    ]  # fmt: skip


def test_on_end_is_called_when_a_run_fails(data, tmp_path):
    events = Record()
    with pytest.raises(ConnectionError):
        train(tiny_run(data, tmp_path), callbacks=[events, Crash(3)])
    assert events.events[-1] == ("failed", 3)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_the_best_checkpoint_has_the_lowest_validation_loss(data, tmp_path):
    train(
        tiny_run(data, tmp_path, steps=4, lr=3.0, min_lr_ratio=1.0, eval_every=2)
    )  # too fast: it gets worse again
    losses = [record["validation_loss"] for record in metrics(tmp_path) if record["kind"] == "eval"]
    assert min(losses) < losses[-1]
    splits = TokenDataset(data.folder, "train"), TokenDataset(data.folder, "validation")
    for folder, loss in [("best", min(losses)), ("last", losses[-1])]:
        loop = Trainer(load_checkpoint(tmp_path / folder), *splits, tiny_run(data, tmp_path).train)
        assert loop.evaluate().validation_loss == pytest.approx(loss, rel=1e-6)


def poisoned(at):
    """The next-token objective, not finite from call ``at`` on."""
    calls = 0

    def objective(model, tokens, step):
        nonlocal calls
        calls += 1
        result = next_token(model, tokens, step)
        return replace(result, loss=result.loss * (math.nan if calls >= at else 1.0))

    return objective


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path):
    loop = trainer(data, tmp_path, objective=poisoned(at=17))  # two calls a step, five for the evaluation
    with pytest.raises(
        NonFiniteError,
        match=r"step 6: the loss is nan.* first seen in the loss: .*; the last checkpoint is kept in .*step-00000004",
    ):
        loop.fit()
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "last").values())
    assert json.loads((tmp_path / "last" / "training_state.json").read_text())["progress"]["step"] == 4


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(data, tmp_path):
    def objective(model, tokens, step):  # sqrt has an infinite slope at 0
        result = next_token(model, tokens, step)
        return replace(result, loss=result.loss + (model.norm.weight[0] - 1).square().sqrt())

    loop = trainer(data, tmp_path, objective=objective)
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    with pytest.raises(
        NonFiniteError,
        match=r"step 1: .*gradient norm nan.* first seen in gradient of norm.weight: .*; no checkpoint had",
    ):
        loop.fit()
    for name, tensor in loop.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_fp16_step_whose_gradient_overflows_is_skipped_and_counted(data, tmp_path):
    scale = iter([1.0, 1.0, 1e35, 1e35] + [1.0] * 100)  # the second step's two micro-batches

    def objective(model, tokens, step):
        result = next_token(model, tokens, step)
        return replace(result, loss=result.loss * next(scale))

    loop = trainer(data, tmp_path, objective=objective, precision="fp16")
    assert not loop.step().skipped
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    record = loop.step()
    assert record.skipped
    assert record.step == 1
    assert record.tokens == 2 * 64  # the text is consumed all the same
    assert (loop.progress.skipped, loop.scaler.get_scale()) == (1, 2.0**15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loop.model.state_dict().items())
    assert not loop.step().skipped
    assert loop.progress.step == 2


def test_a_skipped_step_is_valid_json_and_no_point_of_a_curve(data, tmp_path):
    factors = iter([1.0, 1.0, math.nan, math.nan] + [1.0] * 100)  # the second step's two micro-batches

    def objective(model, tokens, step):
        result = next_token(model, tokens, step)
        factor = next(factors)
        return Objective(factor * result.loss, {"part": factor * result.bound}, factor * result.bound)

    loop = trainer(data, tmp_path, objective=objective, steps=4)
    loop.fit([JSONLMetrics(tmp_path / "metrics.jsonl", start=0, log_every=1)])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    steps = [record for record in records if record["kind"] == "step"]
    bad = steps[1]
    assert [record["skipped"] for record in steps] == [False, True, False, False, False]
    assert bad["loss"] is bad["grad_norm"] is bad["bits_per_byte"] is bad["terms"]["part"] is None
    run = Run(tmp_path, {}, "", {}, records)
    assert run.series("step", "loss")[1] == [steps[i]["loss"] for i in (0, 2, 3, 4)]


def test_the_search_for_the_first_bad_tensor_makes_both_passes_whatever_it_finds():
    """Processes that share weights wait for each other in them, and not all have found something."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    made = []

    def losses():
        loss = model(torch.ones(3, 2)).sum()
        loss.register_hook(lambda gradient: made.append(1))
        return loss

    assert first_non_finite(model, losses) == ""
    with torch.no_grad():
        model[1].weight[0, 1] = math.inf
    assert first_non_finite(model, losses).startswith("parameter 1.weight: 1 of 2 values")
    assert len(made) == 2 and model[0].weight.grad is None


def test_endless_overflow_in_fp16_ends_the_run(data, tmp_path):
    def objective(model, tokens, step):
        result = next_token(model, tokens, step)
        return replace(result, loss=result.loss * 1e37)

    loop = trainer(data, tmp_path, objective=objective, precision="fp16")
    with pytest.raises(NonFiniteError, match="gradient norm (nan|inf), in 21 steps in a row"):
        loop.fit()
    assert loop.progress.step == 0


def other(model, tokens, step):
    """A loss that is not the bound, and no draw alike in training."""
    loss = next_token(model, tokens, step).loss
    return Objective(3 * loss, {"noise": torch.rand(())}, loss.detach() + torch.rand(()))


def test_bits_per_byte_and_the_validation_loss_are_those_of_the_bound(data, tmp_path):
    record = trainer(data, tmp_path, objective=other).step()
    nats = record.bits_per_byte * math.log(2)  # bytes are the tokens, but for the end of a text
    assert record.loss / 3 < nats < record.loss / 3 + 1
    loop = trainer(data, tmp_path, objective=other)
    plain = trainer(data, tmp_path).evaluate().validation_loss
    assert plain < loop.evaluate().validation_loss < plain + 1


def test_an_evaluation_draws_the_same_each_time_and_nothing_from_the_training(data, tmp_path):
    loop = trainer(data, tmp_path, objective=other)
    before = torch.get_rng_state()
    first, torch_seed = loop.evaluate(), torch.initial_seed()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(77)
    assert loop.evaluate().validation_loss == first.validation_loss
    assert (
        trainer(data, tmp_path, objective=other, seed=1).evaluate().validation_loss != first.validation_loss
    )
    assert torch_seed == 0


def test_the_report_is_recorded_and_warns_only_after_the_warm_up(data, tmp_path):
    def report(model, batches, step):
        assert not model.training and not torch.is_grad_enabled()
        return Report({"windows": float(sum(map(len, batches))), "step": float(step)}, {"odd": f"at {step}"})

    loop = trainer(data, tmp_path, report=report, steps=6, warmup_steps=3, eval_every=2)
    records = Record()
    loop.fit([records])
    assert [e.statistics for e in records.evaluations] == [
        {"windows": 10.0, "step": float(s)} for s in (2, 4, 6)
    ]
    assert [e.warnings for e in records.evaluations] == [{}, {"odd": "at 4"}, {"odd": "at 6"}]


def test_tensorboard_events_are_written(data, tmp_path):
    train(tiny_run(data, tmp_path, steps=4, tensorboard=True, utilization=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [scalar.value for scalar in events.Scalars("train/loss")]
    steps = [record["loss"] for record in metrics(tmp_path) if record["kind"] == "step"]
    assert logged == pytest.approx(steps, rel=1e-6)
    assert len(events.Scalars("train/utilization")) == 4
    assert [scalar.step for scalar in events.Scalars("validation/bits_per_byte")] == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eval_tokens": 15},
            r"the first 15 \(train.eval_tokens\) of the \d+ validation tokens do not hold a window",
        ),
        ({"seq_len": 20000}, "at most model.max_seq_len = 32, got 20000"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_trace(data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(data, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_what_the_mixers_have_learned_is_recorded(data, tmp_path):
    run = tiny_run(data, tmp_path, steps=4)
    model = FEMLMConfig(
        vocab_size=257, d_model=16, n_layers=2, n_heads=2, max_seq_len=32, d_ff=16, prior=("softmax", "gla")
    )
    train(replace(run, architecture="fem_lm", model=model))
    statistics = metrics(tmp_path)[-1]["statistics"]
    mixers = [
        module.beta_max
        for module in load_checkpoint(tmp_path / "last").modules()
        if hasattr(module, "beta_max")
    ]
    assert len(mixers) == 2
    for layer, beta in enumerate(mixers):
        assert statistics[f"blocks.{layer}.mixer/beta_mean"] == pytest.approx(beta.mean().item())
        assert 0 < statistics[f"blocks.{layer}.mixer/inner_gate_mean"] < 1
