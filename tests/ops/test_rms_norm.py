"""The norm of every block: against its equation, in every dtype, differentiated once and twice."""

import pytest
import torch

from helmholtz.ops.rms_norm import rms_norm
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 6), (2, 5, 33), (2, 3, 4, 128)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_output_and_gradients_match_the_reference(shape, dtype, eps) -> None:
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    cotangent = [torch.randn(shape).to(dtype).double()]
    wide = torch.promote_types(dtype, torch.float32)
    # below float32 the gradients are torch's own
    budget = 30 if dtype == wide else 3 * torch.finfo(dtype).eps / torch.finfo(wide).eps
    assert_matches("y", rms_norm(x, weight, eps=eps), reference.rms_norm(x, weight, eps=eps), budget=budget)
    got = grads(lambda x, w: [rms_norm(x, w, eps=eps)], [x, weight], cotangent)
    want = grads(lambda x, w: [reference.rms_norm(x, w, eps=eps)], [x, weight], cotangent)
    for name, mine, theirs in zip(("dx", "dweight"), got, want, strict=True):
        assert_matches(name, mine, theirs, budget=budget)


def test_gradcheck_once_and_twice(form) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=1e-3), (x, weight))
    if form == "plain":
        assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, eps=1e-3), (x, weight))


def test_a_gradient_to_be_differentiated_again_is_the_same(form) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(rms_norm(x, weight, eps=1e-3).sin().sum(), (x, weight))
    graph = torch.autograd.grad(rms_norm(x, weight, eps=1e-3).sin().sum(), (x, weight), create_graph=True)
    for a, b in zip(graph, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_stays_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), eps=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_vectors_that_lie_apart_match_the_reference(dtype) -> None:
    """More than one piece of work, every other vector of a wider tensor, and a weight that is wider than they."""
    x, weight = torch.randn(3, 70, 40).to(dtype)[:, ::2, :33], torch.randn(33)
    cotangent = [torch.randn(3, 35, 33).to(dtype).double()]
    wide_budget = (
        30 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    )
    got = grads(lambda x, w: [rms_norm(x, w, eps=1e-6)], [x, weight], cotangent)
    want = grads(lambda x, w: [reference.rms_norm(x, w, eps=1e-6)], [x, weight], cotangent)
    assert_matches(
        "y", rms_norm(x, weight, eps=1e-6), reference.rms_norm(x, weight, eps=1e-6), budget=wide_budget
    )
    for name, mine, theirs in zip(("dx", "dweight"), got, want, strict=True):
        assert mine.dtype == (dtype if name == "dx" else torch.float32)
        assert_matches(name, mine, theirs, budget=wide_budget)


def test_the_kernel_rounds_bfloat16_once(form) -> None:
    if form == "plain":
        return
    x, weight = torch.randn(5, 33).bfloat16(), torch.randn(33)
    cotangent = [torch.randn(5, 33).bfloat16().double()]
    got = grads(lambda x, w: [rms_norm(x, w, eps=1e-6)], [x, weight], cotangent)
    want = grads(lambda x, w: [reference.rms_norm(x, w, eps=1e-6)], [x, weight], cotangent)
    for name, mine, theirs in zip(("dx", "dweight"), got, want, strict=True):
        assert_matches(name, mine, theirs, budget=30)
