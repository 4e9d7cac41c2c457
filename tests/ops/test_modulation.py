"""The scaled linear map against its reference, under autocast, and with outputs that nobody uses."""

import pytest
import torch

from helmholtz.ops.modulation import modulated_linear
from helmholtz.reference.free_energy import modulated_linear as reference
from helpers import DTYPES, assert_matches, grads

WIDTHS = [4, 1, 7]


def problem(shape, dtype, *, bias):
    batch, time = shape
    sizes = [(batch, time, 6), (12, 6), (12,), (batch, time, 3), (12, 3)]
    x, weight, b, features, scale = (torch.randn(size).to(dtype) for size in sizes)
    return (x, weight, b, features, scale) if bias else (x, weight, features, scale)


def call(fn, bias):
    if bias:
        return lambda *args: fn(*args, WIDTHS)
    return lambda x, weight, features, scale: fn(x, weight, None, features, scale, WIDTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 65)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_match_the_reference(shape, dtype, bias):
    inputs = problem(shape, dtype, bias=bias)
    actual, expected = call(modulated_linear, bias)(*inputs), call(reference, bias)(*inputs)
    assert [a.shape[-1] for a in actual] == WIDTHS
    for a, e in zip(actual, expected, strict=True):
        assert_matches("out", a, e, budget=8)
    cotangents = [torch.randn_like(a).double() for a in actual]
    both = (grads(call(fn, bias), inputs, cotangents) for fn in (modulated_linear, reference))
    for name, (got, want) in enumerate(zip(*both, strict=True)):
        assert_matches(str(name), got, want, budget=16)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
def test_narrow_dtypes_stay_within_a_few_roundings(dtype):
    inputs = problem((2, 65), dtype, bias=True)
    actual, expected = call(modulated_linear, True)(*inputs), call(reference, True)(*inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() < 4 * torch.finfo(dtype).eps * e.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    inputs = [x.requires_grad_() for x in problem((2, 3), torch.float64, bias=bias)]
    assert torch.autograd.gradcheck(call(modulated_linear, bias), inputs)


def test_an_output_nobody_uses_has_gradient_zero():
    inputs = [x.requires_grad_() for x in problem((2, 3), torch.float32, bias=True)]
    outputs = call(modulated_linear, True)(*inputs)
    weight_grad = torch.autograd.grad(outputs[1].square().sum(), inputs)[1]
    assert (weight_grad[4] != 0).all() and (weight_grad[:4] == 0).all() and (weight_grad[5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_it_as_any_linear_map_and_gradients_come_back_wide(dtype):
    inputs = [x.requires_grad_() for x in problem((2, 7), torch.float32, bias=True)]
    with torch.autocast("cpu", dtype):
        outputs = call(modulated_linear, True)(*inputs)
    assert all(out.dtype == dtype for out in outputs)
    narrow = call(modulated_linear, True)(*(x.to(dtype) for x in inputs))
    assert all(torch.equal(a, b) for a, b in zip(outputs, narrow, strict=True))
    got = torch.autograd.grad(sum(out.float().sum() for out in outputs), inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in got)


def test_no_tokens():
    assert [y.shape for y in call(modulated_linear, True)(*problem((2, 0), torch.float32, bias=True))] == [
        (2, 0, width) for width in WIDTHS
    ]
