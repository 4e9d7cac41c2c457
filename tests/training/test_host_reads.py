"""A training step on a GPU does not wait for it: nothing is read between two records, nothing is copied unpinned."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from every_decoder import DECODERS
from helmholtz._values import few_reads
from helmholtz.data.tokens import TokenDataset
from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.ops.row_random import row_keys
from helmholtz.training import run as run_module
from helmholtz.training.batches import ReadAhead
from helmholtz.training.callbacks import Callback
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.loop import Trainer
from helmholtz.training.objectives import learned, next_token
from helmholtz.training.parallel import LossModule
from helmholtz.training.parts import objective_class, objective_of
from helmholtz.training.run import train
from host_reads import HostReads, Placements
from tiny_runs import prepare_text, tiny_run

PER_SOLVE = 20
"""Reads of a solver and its gradient, with a hundred steps at most, to a tolerance of 1e-6; tokens do not matter."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def decoder(name: str) -> Decoder:
    model = DECODERS[name]()
    torch.manual_seed(1)
    return type(model)(replace(model.config, vocab_size=257)).train()


def objective_for(model: Decoder):
    wanted = objective_class(model.config)
    return next_token if wanted is None else objective_of(wanted(), seed=0)


def trainer(name: str, data, tmp_path, **changes) -> Trainer:
    run, model = tiny_run(data, tmp_path, **changes), decoder(name)
    splits = TokenDataset(data.folder, "train"), TokenDataset(data.folder, "validation")
    return Trainer(model, *splits, run.train, objective=objective_for(model), report=learned)


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_reads_nothing_and_gives_the_same_numbers(name, data, tmp_path):
    told = []
    for deferred in (False, True):
        loop = trainer(name, data, tmp_path)
        if deferred:
            loop.reads_each_step = False
            loop.batches.read_ahead()
        with HostReads() if deferred else contextlib.nullcontext() as reads:
            for _ in range(2):
                loop.make_step()
            if deferred:
                allowed = 0 if loop.model.equilibrium is None else 4 * PER_SOLVE
                assert len(reads.seen) <= allowed, reads.seen
        told.append([x for record in loop.read_steps() for x in (record.step, record.loss, record.grad_norm)])
    assert told[0] == (told[1] if loop.model.equilibrium is None else pytest.approx(told[1], rel=1e-5))


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_copies_nothing_to_the_device(name, monkeypatch):
    """On the meta device, which is no CPU: what comes from there would be a copy that waits on a GPU."""
    real = torch.autocast  # which does not know of "meta"
    monkeypatch.setattr(torch, "autocast", lambda _, **options: real("cpu", **options))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    model = decoder(name).to("meta")
    module = LossModule(model, objective_for(model), learned)
    tokens, keys = torch.zeros(2, 17, dtype=torch.long), row_keys(0, torch.arange(2))
    tokens, keys = tokens.to("meta"), keys.to("meta")
    with Placements() as placements, drawn_by_row(keys), few_reads():
        module(tokens, 0)[0].backward()
    assert not placements.seen


def test_the_modes_see_what_they_are_for():
    x = torch.ones(3)
    with HostReads() as reads:
        x.sum().item(), x[x > 0], x.nonzero(), bool(x.all()), x + 1, x[torch.tensor([1])]
    assert len(reads.seen) == 4
    with Placements() as placements:
        y = torch.zeros(2, device="meta")
        y + 1, torch.tensor([1.0, 2.0], device="meta"), torch.full((), 2.0, device="meta")
    assert placements.seen
    with Placements() as placements:
        y + 1, torch.full((), 2.0, device="meta"), y.new_zeros(1)
    assert not placements.seen


class Crash(Callback):
    def on_step(self, record):
        if record.step == 11:
            raise ConnectionError("the machine is gone")


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture
def reads_late(monkeypatch):
    """Runs go on as on a GPU."""
    made = run_module._trainer

    def trainer_of(*arguments):
        loop = made(*arguments)
        loop.reads_each_step = False
        loop.batches.read_ahead()
        return loop

    return lambda: monkeypatch.setattr(run_module, "_trainer", trainer_of)


def test_a_run_that_is_read_late_is_the_same_run_and_resumes_to_the_bit(data, tmp_path, reads_late):
    train(tiny_run(data, tmp_path / "each", log_every=7))
    reads_late()
    train(tiny_run(data, tmp_path / "late", log_every=7))
    assert records(tmp_path / "late") == records(tmp_path / "each")
    with pytest.raises(ConnectionError):
        train(tiny_run(data, tmp_path / "broken", log_every=7), callbacks=[Crash()])
    train(tiny_run(data, tmp_path / "broken", log_every=7, resume="auto"))
    assert records(tmp_path / "broken") == records(tmp_path / "each")
    weights = [load_checkpoint(tmp_path / name / "last").state_dict() for name in ("each", "late", "broken")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) and torch.equal(tensor, weights[2][name])


def test_a_step_that_must_not_be_made_is_left_out_where_nobody_looks(data, tmp_path):
    def objective(model, tokens, step):
        found = next_token(model, tokens, step)
        calls.append(step)
        return replace(found, loss=found.loss * torch.nan) if len(calls) in (3, 4) else found

    told = []
    for deferred in (False, True):
        calls, loop = [], trainer("transformer", data, tmp_path, accumulation=1)
        loop.loss_module._objective, loop.reads_each_step = objective, not deferred
        got = []
        for _ in range(3):
            for _ in range(2):
                loop.make_step()
                got += [] if deferred else loop.read_steps()
            got += loop.read_steps() if deferred else []
        told.append([(r.step, r.skipped, r.tokens) for r in got])
        assert loop.progress.step == 4 and loop.progress.skipped == 2
        assert all(state["step"] == 4 for state in loop.optimizer.state.values())
        assert all(parameter.isfinite().all() for parameter in loop.model.parameters())
    assert told[0] == told[1] == [(s, k, 32 * (i + 1)) for i, (s, k) in enumerate(
        [(1, False), (2, False), (2, True), (2, True), (3, False), (4, False)])]  # fmt: skip


def test_more_skipped_steps_than_allowed_end_a_run_that_is_read_late(data, tmp_path, reads_late):
    reads_late()
    with pytest.raises(NonFiniteError, match="in 3 steps in a row"):
        seldom = dict.fromkeys(("steps", "log_every", "eval_every", "save_every"), 20)
        train(tiny_run(data, tmp_path, lr=1e30, max_skipped=2, clip_norm=1e30, **seldom))


def test_what_is_read_ahead_is_what_is_asked_for():
    asked = []

    def read(first):
        asked.append(first)
        return torch.full((1, 2), first), torch.full((1,), first)

    ahead = ReadAhead(read, 3)
    assert [int(ahead(n)[1]) for n in (0, 3, 6, 30, 33)] == [0, 3, 6, 30, 33]
    ahead._pool.shutdown()
    assert asked == [0, 3, 6, 9, 12, 30, 33, 36, 39]  # 9 and 12 for nothing
