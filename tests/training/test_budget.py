import pytest
import torch
from torch import nn

from distributed_cases import distributed_run
from helmholtz.training.budget import matmul_peak, measure_budget
from helmholtz.training.run import prepare
from tiny_runs import prepare_text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))


def test_costs_of_a_small_network_are_those_of_the_pencil(model):
    x = torch.randn(10, 8)
    budget = measure_budget(model, lambda: model(x).sum(), micro_batches=3)
    n = 8 * 16 + 16 * 4
    assert (budget.parameters, budget.trained_parameters) == (n, n)
    assert (budget.weight_bytes, budget.gradient_bytes, budget.optimizer_bytes) == (4 * n, 4 * n, 8 * n)
    # a product forward, two backward, but none for the gradient of x
    assert budget.flops == 3 * 2 * 10 * (2 * 8 * 16 + 3 * 16 * 4)
    # kept: x, and the ReLU's output, which is also what the second product reads
    assert budget.activation_bytes == 4 * 10 * (8 + 16)
    assert budget.total_bytes == 16 * n + budget.activation_bytes


def test_frozen_weights_cost_no_gradient_and_gradients_are_left_as_they_were(model):
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = before = torch.ones(4, 16)
    budget = measure_budget(model, lambda: model(torch.randn(10, 8)).sum(), micro_batches=1)
    assert budget.gradient_bytes == 4 * 16 * 4
    assert model[2].weight.grad is before
    assert torch.equal(before, torch.ones(4, 16))
    assert model[0].weight.grad is None


def test_the_matmul_speed_is_a_plausible_number():
    assert 1e8 < matmul_peak(torch.float32, torch.device("cpu")) < 1e15


def test_counting_writes_nothing_into_a_memory(tmp_path):
    run = distributed_run(
        prepare_text(tmp_path),
        architecture="mamba_hopfield",
        output=tmp_path / "run",
        train={"steps": 4},
        objective={"memory_write_step": 0},
    )
    trainer = prepare(run)
    assert trainer.budget().flops > 0
    assert not trainer.model.memory.occupied.any()
    trainer.step()
    assert trainer.model.memory.occupied.any()
