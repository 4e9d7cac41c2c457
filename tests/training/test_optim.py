import math

import pytest
import torch
from torch import nn

from helmholtz.layers import FreeEnergyMixer, FreeEnergyMixerConfig
from helmholtz.training.config import TrainConfig
from helmholtz.training.optim import learning_rate, make_optimizer, parameter_groups


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.RMSNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.unembed = nn.Linear(4, 7, bias=False)
        self.unembed.weight = self.embed.weight


def test_matrices_decay_and_vectors_do_not():
    model = Tied()
    decayed, kept = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert {id(p) for p in decayed["params"]} == {id(model.embed.weight), id(model.hidden.weight)}
    assert kept["weight_decay"] == 0.0
    assert {id(p) for p in kept["params"]} == {id(model.norm.weight), id(model.hidden.bias)}
    assert len(decayed["params"]) == 2  # the tied weight once


def test_a_factor_makes_groups_of_its_own_and_keeps_the_rule_of_decay():
    model = Tied()
    groups = parameter_groups(model, 0.3, {"hidden.": 0.5, "norm.": 2.0})
    found = [(g["lr_factor"], g["weight_decay"], {id(p) for p in g["params"]}) for g in groups]
    assert found == [
        (1.0, 0.3, {id(model.embed.weight)}),
        (1.0, 0.0, set()),
        (0.5, 0.3, {id(model.hidden.weight)}),
        (0.5, 0.0, {id(model.hidden.bias)}),
        (2.0, 0.3, set()),
        (2.0, 0.0, {id(model.norm.weight)}),
    ]
    with pytest.raises(
        ValueError, match="lr_factors must be the prefix of a trained parameter's name, got 'enc'"
    ):
        parameter_groups(model, 0.3, {"enc": 0.5})


def test_temperatures_and_decay_rates_stored_as_tables_do_not_decay():
    mixers = [
        FreeEnergyMixer(FreeEnergyMixerConfig(d_model=32, n_heads=2, prior=prior))
        for prior in ("softmax", "mamba")
    ]
    kept = {id(p) for p in parameter_groups(nn.ModuleList(mixers), 0.3)[1]["params"]}
    assert {id(mixers[0].theta), id(mixers[1].theta), id(mixers[1].prior.A_raw)} <= kept


def test_decay_shrinks_a_matrix_and_leaves_a_vector_when_gradients_are_zero():
    model = nn.Linear(3, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model.bias, before[1], rtol=0, atol=0)


def test_schedule_values():
    config = TrainConfig(steps=111, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(4, config) == pytest.approx(1.0)
    assert learning_rate(9, config) == pytest.approx(2.0)
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half-way down the cosine
    assert learning_rate(85, config) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(0.75 * math.pi))))
    assert learning_rate(110, config) == pytest.approx(0.2)
    values = [learning_rate(step, config) for step in range(111)]
    assert values[10:] == sorted(values[10:], reverse=True)


def test_schedule_without_warmup_and_of_one_step():
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=0, lr=0.5)) == pytest.approx(0.5)
    flat = TrainConfig(steps=5, warmup_steps=0, lr=0.5, min_lr_ratio=1.0)
    assert [learning_rate(step, flat) for step in range(5)] == [0.5] * 5
