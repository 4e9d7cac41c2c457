"""The gate that turns an attention layer's mean into a gated free energy."""

import pytest
import torch

from helmholtz.layers import FreeEnergyGate
from helmholtz.reference import masked_free_energy

ATTENTION = {"q": (2, 4, 5, 6), "k": (2, 2, 5, 6), "v": (2, 2, 5, 3)}


def call(dtype=torch.float32):
    shapes = {"mean": (2, 5, 4, 3), "x": (2, 5, 8), **ATTENTION}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def livened(gate):
    """Every parameter away from the start."""
    for name, parameter in gate.named_parameters():
        with torch.no_grad():
            parameter.copy_(0.5 * torch.randn_like(parameter) + (name == "alpha"))
    return gate


def by_hand(gate, mean, x, q, k, v):
    p = {name: parameter.double() for name, parameter in gate.named_parameters()}
    free = masked_free_energy(q, k, v, p["log_beta"].exp(), causal=True).transpose(1, 2)
    inner, outer = ((x.double() @ p[f"{name}.weight"].T).view(2, 5, 4, -1) for name in ("inner", "outer"))
    lam = p["alpha"] / (1 + (-inner).exp())
    return outer.exp() * ((1 - lam) * mean.double() + lam * free)


@pytest.mark.parametrize("gates", ["channel", "head"])
def test_output_and_gradients_are_those_of_the_formula(gates):
    gate = livened(FreeEnergyGate(8, 4, 3, n_kv_heads=2, gates=gates).double())
    given = {name: x.requires_grad_() for name, x in call(torch.float64).items()}
    leaves = [*given.values(), *gate.parameters()]
    actual, expected = gate(**given, causal=True), by_hand(gate, **given)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    both = (torch.autograd.grad((out * cotangent).sum(), leaves) for out in (actual, expected))
    for got, want in zip(*both, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gates", ["channel", "head"])
def test_it_starts_as_the_mean_bit_for_bit(dtype, gates):
    given = call(dtype)
    gate = FreeEnergyGate(8, 4, 3, n_kv_heads=2, gates=gates, beta=3.0, dtype=dtype)
    read = gate(**given, causal=True)
    assert read.dtype == dtype and torch.equal(read, given["mean"])


def test_at_the_start_alpha_and_the_outer_gate_alone_have_a_gradient_and_then_all():
    gate = FreeEnergyGate(8, 4, 3, n_kv_heads=2)
    gate(**call()).square().sum().backward()
    reached = {name: bool((p.grad != 0).all()) for name, p in gate.named_parameters()}
    assert reached == {"alpha": True, "log_beta": False, "inner.weight": False, "outer.weight": True}
    with torch.no_grad():
        gate.alpha.sub_(0.1 * gate.alpha.grad)
    gate.zero_grad()
    gate(**call()).square().sum().backward()
    assert all((p.grad != 0).all() for p in gate.parameters())


def test_lambda_of_one_is_the_free_energy_and_its_temperature_starts_where_asked():
    gate, given = FreeEnergyGate(8, 4, 3, n_kv_heads=2, beta=2.5), call()
    torch.testing.assert_close(gate.beta, torch.full((2, 3), 2.5))
    gate.alpha.data.fill_(2.0)  # times sigmoid(0)
    free = masked_free_energy(given["q"], given["k"], given["v"], torch.full((2, 3), 2.5)).transpose(1, 2)
    torch.testing.assert_close(gate(**given), free.float())


def test_no_parameter_is_a_scalar_and_a_gate_per_head_is_smaller():
    sizes = {
        g: [p.numel() for p in FreeEnergyGate(8, 1, 1, gates=g).parameters()] for g in ("channel", "head")
    }
    assert sizes["channel"] == sizes["head"] == [1, 1, 8, 8]
    assert all(p.ndim > 0 for p in FreeEnergyGate(8, 1, 1).parameters())
    count = {
        g: sum(p.numel() for p in FreeEnergyGate(8, 4, 3, gates=g).parameters()) for g in ("channel", "head")
    }
    assert count == {"channel": 12 + 12 + 2 * 8 * 12, "head": 4 + 12 + 2 * 8 * 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"beta": 0.0}, "beta must be a finite number above 0, got 0.0"),
        ({"cap": -1.0}, "cap must be a finite number above 0"),
        ({"d_head": 0}, "d_head must be an integer of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        FreeEnergyGate(**{"d_model": 8, "n_heads": 4, "d_head": 3} | options)
