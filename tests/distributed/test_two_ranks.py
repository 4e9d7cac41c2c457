"""Two processes make the run that one makes: same losses and gradient norms, same files, resumed on either number.

Few steps of two architectures here; ``make learn`` takes 20 of all.
"""

import pytest
import torch

from distributed_cases import (
    STRATEGIES,
    assert_equal_runs,
    assert_same_run,
    distributed_run,
    make_runs,
    records,
)
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.run import train
from tiny_runs import prepare_text

pytestmark = pytest.mark.slow  # the first test makes all runs
N_STEPS = 6
ARCHITECTURES = ("free_transformer", "mamba_hopfield")
"""Those that draw plans, and that write a memory; both have dropout or equilibria besides what a plain decoder has."""
EVERY = pytest.mark.parametrize(
    ("architecture", "strategy"), [(name, strategy) for name in ARCHITECTURES for strategy in STRATEGIES]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"), data, N_STEPS, ARCHITECTURES)


@EVERY
def test_two_processes_make_the_run_of_one(runs, architecture, strategy):
    folder, _ = runs
    assert_same_run(folder / f"{architecture}-one", folder / f"{architecture}-{strategy}-whole", N_STEPS)


@EVERY
def test_resumed_on_two_it_is_the_uninterrupted_run_to_the_bit(runs, architecture, strategy):
    folder, _ = runs
    assert_equal_runs(*(folder / f"{architecture}-{strategy}-{name}" for name in ("whole", "resumed")))


@EVERY
def test_a_checkpoint_of_two_is_resumed_by_one(runs, data, architecture, strategy):
    folder, settings = runs
    half = folder / f"{architecture}-{strategy}-half"
    train(distributed_run(data, architecture=architecture, output=half, train=settings | {"resume": "auto"}))
    assert_same_run(folder / f"{architecture}-one", half, N_STEPS)


@pytest.mark.parametrize("way", ["hybrid", "recomputed"])
def test_replicated_shards_and_recomputed_blocks_change_nothing(runs, way):
    folder, _ = runs
    assert_same_run(folder / "free_transformer-one", folder / f"free_transformer-{way}", N_STEPS)


def test_weights_gathered_in_bf16_train_as_well(runs):
    folder, _ = runs
    one, half = (records(folder / f"free_transformer-{name}", "step") for name in ("one", "half"))
    losses = [[record["loss"] for record in run] for run in (one, half)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = load_checkpoint(folder / "free_transformer-half" / "last").state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
