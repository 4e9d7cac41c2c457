"""The free-energy read, its tilt and its gates against their float64 references."""

import math

import pytest
import torch

from helmholtz.ops.free_energy import (
    free_energy_from_mixed,
    free_energy_read,
    hidden_temperature,
    posterior,
    tilt_values,
)
from helmholtz.ops.gated_read import gated_read, outer_gate
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, SHAPES, assert_matches, grads

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(shape, dtype, *, heads=3, groups=3):
    batch, time = shape
    q, k = torch.randn(batch, heads, time, 6), torch.randn(batch, groups, time, 6)
    return (
        *(x.to(dtype) for x in (q, k, torch.randn(batch, groups, time, 5))),
        torch.rand(groups, 5).to(dtype) + 0.5,
    )


def assert_op_matches(op, twin, inputs, names, *, budget):
    """Outputs within ``budget`` and gradients within four times as much."""
    actual, expected = op(*inputs), twin(*inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_matches("out", a, e, budget=budget)
    cotangents = [torch.randn_like(a).double() for a in actual]
    got, want = grads(op, inputs, cotangents), grads(twin, inputs, cotangents)
    for name, a, e in zip(names, got, want, strict=True):
        assert a.dtype == inputs[names.index(name)].dtype
        if e.abs().max().item() < 1e-12:  # nothing to choose from: the exact gradient of the weights is 0
            assert a.abs().max().item() < 4 * budget * torch.finfo(torch.float32).eps, name
        else:
            assert_matches(name, a, e, budget=4 * budget)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_read_matches_the_reference(shape, dtype):
    inputs = problem(shape, dtype)
    assert_op_matches(free_energy_read, reference.free_energy_read, inputs, ["q", "k", "v", "beta"], budget=8)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads_match_the_reference(groups):
    inputs = problem((2, 9), torch.float32, heads=4, groups=groups)
    assert_op_matches(free_energy_read, reference.free_energy_read, inputs, ["q", "k", "v", "beta"], budget=8)


def test_the_clip_matches_the_reference_on_both_sides():
    q, k, v, beta = problem((2, 20), torch.float64)
    inputs = (q, k, 10 * v, beta)
    ops = [lambda *args, fn=fn: fn(*args, cap=3.0) for fn in (free_energy_read, reference.free_energy_read)]
    assert_op_matches(*ops, inputs, ["q", "k", "v", "beta"], budget=64)


def test_gradcheck_of_the_read():
    inputs = [x.requires_grad_() for x in problem((2, 5), torch.float64, heads=2, groups=1)]
    assert torch.autograd.gradcheck(free_energy_read, inputs)


@every_dtype
@pytest.mark.parametrize("signals_first", [False, True])
@pytest.mark.parametrize("time", [1, 7, 33])
def test_the_tilt_is_the_value_and_its_exponential(dtype, signals_first, time):
    v, beta = torch.randn(2, time, 22).to(dtype)[..., 3:18], torch.rand(3, 5).to(dtype) + 0.5
    v = v.unflatten(-1, (3, 5)).transpose(1, 2)

    def twin(v, beta):
        v, beta = v.double(), beta.double().unsqueeze(1)
        return [torch.stack([v, (beta * v).clamp(-1.0, 1.0).exp()], dim=-2)]

    def op(v, beta):
        return [tilt_values(v, beta, cap=1.0, signals_first=signals_first)]

    assert_op_matches(op, twin, (v, beta), ["v", "beta"], budget=4)
    assert op(v, beta)[0].dtype == torch.promote_types(dtype, torch.float32)


def test_the_mean_stays_linear_beyond_the_cap_and_the_free_energy_saturates():
    v = torch.tensor([100.0, -100.0]).view(1, 1, 2, 1).requires_grad_()
    signals = tilt_values(v, torch.full((1, 1), 2.0), cap=40.0)
    mean, free = free_energy_from_mixed(signals, torch.full((1, 1), 2.0))
    torch.testing.assert_close(mean.flatten(), torch.tensor([100.0, -100.0]))
    torch.testing.assert_close(free.flatten(), torch.tensor([20.0, -20.0]))
    (grad,) = torch.autograd.grad(mean.sum() + free.sum(), v)
    assert (grad == 1).all()


def test_a_row_that_saw_nothing_reads_zero_with_gradient_zero():
    mixed = torch.rand(2, 3, 4, 2, 5) + 0.5
    mixed[0, 1], mixed[1, :, 2] = 0, 0
    mixed.requires_grad_()
    beta = torch.full((3, 5), 0.7, requires_grad=True)
    mean, free = free_energy_from_mixed(mixed, beta)
    blind = mixed.detach()[..., 0, :] == 0
    assert blind.any() and (mean[blind] == 0).all() and (free[blind] == 0).all()
    d_mixed, d_beta = torch.autograd.grad(free.sum(), [mixed, beta])
    assert d_beta.isfinite().all() and (d_mixed.movedim(-2, 0)[:, blind] == 0).all()
    inner = torch.randn(2, 4, 3, 5)
    read = gated_read(mixed.transpose(1, 2), beta, inner)
    (d_mixed,) = torch.autograd.grad(read.sum(), mixed)
    assert (read.transpose(1, 2)[blind] == 0).all()
    assert d_mixed.isfinite().all() and (d_mixed[..., 1, :][blind] == 0).all()


GATED = [(1, 1, 1, 3), (2, 63, 3, 5), (1, 1, 4, 5), (3, 1, 1, 2), (1, 900, 8, 32)]
"""B, T, H, V; the last takes several blocks."""


@every_dtype
@pytest.mark.parametrize("shape", GATED, ids=str)
@pytest.mark.parametrize("gates", ["inner outer own", "inner", "outer", "own", ""])
@pytest.mark.parametrize("read", ["free energy", "mean"])
def test_the_gated_read_matches_the_reference(shape, dtype, gates, read):
    batch, time, heads, width = shape
    inputs = {"mixed": torch.rand(batch, time, heads, 2, width) + 0.2, "beta": torch.rand(heads, width) + 0.5}
    inputs |= {name: torch.randn(shape) for name in gates.split()}
    if read == "mean":
        inputs["mixed"] = inputs["mixed"][..., :1, :]
        del inputs["beta"]
        inputs.pop("inner", None)
    names = list(inputs)

    def call(fn):
        return lambda *args: [fn(**{"beta": None, **dict(zip(names, args, strict=True))})]

    tensors = tuple(x.to(dtype) for x in inputs.values())
    assert_op_matches(call(gated_read), call(reference.gated_read), tensors, names, budget=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_small_own_gate_meets_the_floor_of_its_norm(dtype):
    own = torch.full((1, 2, 3, 5), -14.0, dtype=dtype)
    gate = own.exp().log1p() + 1e-6
    expected = gate * (gate.square() + torch.finfo(dtype).eps) ** -0.5
    read = gated_read(torch.ones(1, 2, 3, 1, 5, dtype=dtype), None, own=own)
    torch.testing.assert_close(read, expected)
    assert dtype == torch.float64 or read.max() < 0.01


@pytest.mark.parametrize("signals_first", [False, True])
def test_the_gated_read_takes_bf16_gates_beside_float32_averages(signals_first):
    """Gates as slices of one projection, averages in either layout, a head that saw nothing; rounded once."""
    mixed = (
        torch.rand(2, 21, 2, 3, 5).transpose(2, 3)
        if signals_first
        else torch.rand(2, 3, 21, 2, 5).transpose(1, 2)
    )
    mixed[1, 4, 2] = 0
    joint = torch.randn(2, 21, 50).bfloat16()
    gates = [joint[..., i : i + 15].unflatten(-1, (3, 5)) for i in (1, 16, 34)]
    inputs = (mixed, torch.rand(3, 5) + 0.5, *gates)
    read = gated_read(*inputs)
    assert read.dtype == torch.bfloat16
    names = ["mixed", "beta", "inner", "outer", "own"]
    calls = [lambda *args, fn=fn: [fn(*args)] for fn in (gated_read, reference.gated_read)]
    assert_op_matches(*calls, inputs, names, budget=16)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1, 4, 3), (2, 5, 2, 3)], ids=str)
@pytest.mark.parametrize("signals_first", [False, True])
def test_the_gated_read_leaves_its_inputs_alone(shape, signals_first):
    """Also where the two averages are contiguous already, as one token of one row can be."""
    batch, time, heads, width = shape
    mixed = torch.rand(batch, time, heads, 2, width)
    if signals_first:
        mixed = torch.rand(batch, time, 2, heads, width).transpose(2, 3)
    mixed[0, 0, 0] = 0
    inputs = [mixed, torch.rand(heads, width) + 0.5, torch.randn(shape), torch.randn(shape)]
    copies = [x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    gated_read(*leaves).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_gradcheck_of_the_gated_read():
    shape = (2, 3, 2, 3)
    mixed = (torch.rand(2, 3, 2, 2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    beta, inner, outer = (
        torch.rand(s, dtype=torch.float64, requires_grad=True) for s in [(2, 3), shape, shape]
    )
    assert torch.autograd.gradcheck(lambda *args: gated_read(*args), (mixed, beta + 0.5, inner, outer))
    assert torch.autograd.gradcheck(lambda m, b: gated_read(m, b), (mixed, beta + 0.5))


def test_the_outer_gate_is_positive_with_mean_square_one():
    gate = outer_gate(4 * torch.randn(3, 7, 5, 8))
    assert (gate > 0).all()
    torch.testing.assert_close(gate.square().mean(-1), torch.ones(3, 7, 5))


def weights_and_values(count=200, tokens=12):
    logits = 2 * torch.randn(count, tokens, dtype=torch.float64)
    logits[:, -2:] = -torch.inf
    return logits.softmax(-1), torch.randn(count, tokens, dtype=torch.float64)


def test_the_posterior_matches_the_reference_and_keeps_zeros():
    p, v = weights_and_values()
    beta = 3 * torch.rand(200, dtype=torch.float64)
    q = posterior(p, v, beta)
    torch.testing.assert_close(q, reference.free_energy_posterior(p, v, beta))
    assert (q[:, -2:] == 0).all()
    values = torch.randn(1, 4, requires_grad=True)
    nothing = posterior(torch.zeros(1, 4), values, torch.ones(1))
    assert (nothing == 0).all()
    assert (torch.autograd.grad(nothing.sum(), values)[0] == 0).all()


def test_the_hidden_temperature_reads_what_the_gate_reads():
    p, v = weights_and_values()
    lam, beta_max = torch.rand(200, dtype=torch.float64), 5 * torch.rand(200, dtype=torch.float64) + 0.1
    lam[:2] = torch.tensor([0.0, 1.0])
    found = hidden_temperature(lam, p, v, beta_max)
    mean, top = reference.free_energy_from_weights(p, v, beta_max)
    target = (1 - lam) * mean + lam * top
    torch.testing.assert_close(found.value, target)
    assert (found.beta >= 0).all() and (found.beta <= beta_max).all()
    at_star = reference.free_energy_from_weights(p, v, found.beta.clamp(min=1e-9))[1]
    torch.testing.assert_close(at_star[2:], target[2:], rtol=1e-9, atol=1e-9)
    assert found.beta[0] < 1e-9 and abs(found.beta[1] - beta_max[1]) < 1e-9
    q = reference.free_energy_posterior(p, v, found.beta)
    kl = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log(), 0).sum(-1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-6, atol=1e-10)


def test_the_hidden_temperature_grows_with_the_gate_at_its_known_rate():
    p, v = weights_and_values()
    beta_max, step = torch.full((200,), 2.0, dtype=torch.float64), 1e-5
    lam = 0.1 + 0.8 * torch.rand(200, dtype=torch.float64)
    below, here, above = (hidden_temperature(lam + d, p, v, beta_max) for d in (-step, 0.0, step))
    mean, top = reference.free_energy_from_weights(p, v, beta_max)
    q = reference.free_energy_posterior(p, v, here.beta)
    kl = torch.where(p > 0, q * (q / p).log(), 0).sum(-1)
    slope = (top - mean) * here.beta.square() / kl
    assert (slope > 0).all()
    torch.testing.assert_close((above.beta - below.beta) / (2 * step), slope, rtol=1e-5, atol=1e-6)


def test_values_that_do_not_vary_have_no_hidden_temperature():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    v = torch.tensor([[3.0, 3.0, 7.0], [1.0, 2.0, 3.0], [1.0, 2.0, 9.0]], dtype=torch.float64)
    found = hidden_temperature(torch.full((3,), 0.5), p, v, torch.full((3,), 2.0))
    assert found.beta.isnan().tolist() == [True, True, False]
    torch.testing.assert_close(found.value[:2], torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert (found.kl[:2].abs() < 1e-12).all()


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0])
def test_the_error_stays_below_the_documented_bound(beta):
    q, k, v, _ = problem((2, 130), torch.float32)
    temperature = torch.full((3, 5), beta)
    _, free = free_energy_read(q, k, 3 * v, temperature)
    _, exact = reference.free_energy_read(q, k, 3 * v, temperature)
    bound = (8 + (3 * beta * v).abs().max()) * torch.finfo(torch.float32).eps / beta
    assert (free - exact).abs().max() < bound
    assert math.isfinite(bound)


def test_hidden_temperature_where_the_prior_avoids_the_largest_value_and_sums_to_less_than_one():
    prior = torch.tensor([1 - 3e-7, 1e-12, 1e-9], dtype=torch.float64)
    v, beta = torch.tensor([-3.0, 12.0, 2.0], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    for lam in (0.0, 1e-3, 0.5, 1.0):
        found = hidden_temperature(torch.tensor(lam), prior, v, beta)
        mean, free = reference.free_energy_from_weights(prior, v, beta)
        torch.testing.assert_close(found.value, (1 - lam) * mean + lam * free)
        assert found.beta.isfinite() and found.kl.isfinite() and 0 <= found.beta <= beta
