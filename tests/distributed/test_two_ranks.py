"""Two processes make the run that one makes: same losses and gradient norms, same files, resumed on either number."""

import json
from pathlib import Path

import pytest
import torch

from distributed_cases import SIZES, distributed_run, run_cases
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.run import train
from tiny_runs import prepare_text

STRATEGIES = ("ddp", "fsdp")
WAYS = {
    "hybrid": {"strategy": "fsdp", "replicas": 2},
    "recomputed": {"strategy": "fsdp", "recompute_every": 1},
    "half": {"strategy": "fsdp", "gather_dtype": "bf16"},
}
"""Other ways to share the work."""
TOLERANCE = 1e-6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test makes all runs, a minute's work


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folder of ``<architecture>-<strategy>-<whole|resumed|stopped>`` and ``<architecture>-one``."""
    folder = tmp_path_factory.mktemp("runs")
    cases = []
    for architecture in SIZES:
        for strategy in STRATEGIES:
            base = {"architecture": architecture, "parallel": {"strategy": strategy}}
            name = f"{folder}/{architecture}-{strategy}"
            cases.append(base | {"output": f"{name}-whole", "train": {}})
            resumed = base | {"output": f"{name}-resumed"}
            cases.append(resumed | {"train": {}, "stop": 13, "copy": f"{name}-stopped"})
            cases.append(resumed | {"train": {"resume": "auto"}})
    for name, parallel in WAYS.items():
        output = f"{folder}/free_transformer-{name}"
        cases.append(
            {"architecture": "free_transformer", "parallel": parallel, "output": output, "train": {}}
        )
    run_cases(folder, data, cases)
    for architecture in SIZES:
        train(
            distributed_run(data, architecture=architecture, output=folder / f"{architecture}-one", train={})
        )
    return folder


def records(folder, kind):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines if line["kind"] == kind
    ]


def assert_same_run(one, two):
    """The same losses, terms and gradient norms in every step, and the same evaluations."""
    assert len(records(one, "step")) == len(records(two, "step")) == 20
    for a, b in zip(records(one, "step"), records(two, "step"), strict=True):
        for name in ("loss", "grad_norm", "bits_per_byte"):
            assert b[name] == pytest.approx(a[name], rel=TOLERANCE), (a["step"], name)
        for name, value in a["terms"].items():
            assert b["terms"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (a["step"], name)
    for a, b in zip(records(one, "eval"), records(two, "eval"), strict=True):
        assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", SIZES)
def test_two_processes_make_the_run_of_one(runs, architecture, strategy):
    assert_same_run(runs / f"{architecture}-one", runs / f"{architecture}-{strategy}-whole")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", SIZES)
def test_resumed_on_two_it_is_the_uninterrupted_run_to_the_bit(runs, architecture, strategy):
    whole, resumed = (runs / f"{architecture}-{strategy}-{name}" for name in ("whole", "resumed"))
    for kind in ("step", "eval"):
        assert records(whole, kind) == records(resumed, kind)
    one, two = (load_checkpoint(folder / "last").state_dict() for folder in (whole, resumed))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", SIZES)
def test_a_checkpoint_of_two_is_resumed_by_one(runs, data, architecture, strategy):
    folder = runs / f"{architecture}-{strategy}-stopped"
    train(distributed_run(data, architecture=architecture, output=folder, train={"resume": "auto"}))
    assert_same_run(runs / f"{architecture}-one", folder)


@pytest.mark.parametrize("way", ["hybrid", "recomputed"])
def test_replicated_shards_and_recomputed_blocks_change_nothing(runs, way):
    assert_same_run(runs / "free_transformer-one", runs / f"free_transformer-{way}")


def test_weights_gathered_in_bf16_train_as_well(runs):
    one, half = (records(runs / f"free_transformer-{name}", "step") for name in ("one", "half"))
    losses = [[record["loss"] for record in run] for run in (one, half)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = load_checkpoint(runs / "free_transformer-half" / "last").state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
