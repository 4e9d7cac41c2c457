"""The gate of the feed-forward: against its equation, in every dtype, differentiated once and twice."""

import pytest
import torch

from helmholtz.ops.swiglu import swiglu
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 6), (2, 5, 66), (2, 3, 1024)], ids=str)
def test_output_and_gradient_match_the_reference(shape, dtype) -> None:
    gate_up = (4 * torch.randn(shape)).to(dtype)
    narrow = torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
    # below float32 torch's silu rounds its result, and so does the product
    budget = 4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if narrow else 8
    assert_matches("y", swiglu(gate_up), reference.swiglu(gate_up), budget=budget)
    cotangent = [torch.randn(*shape[:-1], shape[-1] // 2).to(dtype).double()]
    (got,) = grads(lambda x: [swiglu(x)], [gate_up], cotangent)
    (want,) = grads(lambda x: [reference.swiglu(x)], [gate_up], cotangent)
    assert_matches("dx", got, want, budget=budget)


def test_gradcheck_once_and_twice(form) -> None:
    gate_up = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)
    assert form == "kernel" or torch.autograd.gradgradcheck(swiglu, gate_up)
    (plain,) = torch.autograd.grad(swiglu(gate_up).sin().sum(), gate_up)
    (graph,) = torch.autograd.grad(swiglu(gate_up).sin().sum(), gate_up, create_graph=True)
    torch.testing.assert_close(graph, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["apart", "transposed", "a slice"])
def test_many_rows_that_lie_anywhere_match_the_reference(dtype, rows, form) -> None:
    gate_up = torch.randn(3, 40, 66).to(dtype)
    gate_up = {
        "apart": gate_up[..., :30],
        "transposed": gate_up.transpose(0, 1),
        "a slice": gate_up[:, 5:30],
    }[rows]
    cotangent = [torch.randn(*gate_up.shape[:-1], gate_up.shape[-1] // 2).to(dtype).double()]
    once = form == "kernel" or dtype == torch.float32
    budget = 8 if once else 4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_matches("y", swiglu(gate_up), reference.swiglu(gate_up), budget=budget)
    leaf = gate_up.detach().requires_grad_()
    (got,) = torch.autograd.grad(swiglu(leaf), leaf, cotangent[0].to(dtype))
    (want,) = grads(lambda x: [reference.swiglu(x)], [gate_up], cotangent)
    assert_matches("dx", got, want, budget=budget)


def test_large_gates_are_finite_and_no_rows_are_no_rows() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 1.0, 2.0]], requires_grad=True)
    y = swiglu(gate_up)
    (gradient,) = torch.autograd.grad(y.sum(), gate_up)
    assert torch.equal(y, torch.tensor([[0.0, 2e4]])) and torch.equal(
        gradient, torch.tensor([[0.0, 2, 0, 1e4]])
    )
    assert swiglu(torch.zeros(2, 0, 6)).shape == (2, 0, 3) and swiglu(torch.zeros(2, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match="gate_up: wanted two halves side by side"):
        swiglu(torch.zeros(2, 5))


def test_rows_of_the_gradient_never_lie_whole_pages_apart(form) -> None:
    if form == "plain":
        return
    for width, stride in ((1024, 1040), (2048, 2064), (1000, 1000)):
        gate_up = torch.randn(3, width, requires_grad=True)
        (gradient,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)
        assert gradient.shape == (3, width) and gradient.stride() == (stride, 1)
    weight = torch.randn(3, 1024, requires_grad=True)
    swiglu(weight).sum().backward()
    assert weight.grad is not None and weight.grad.is_contiguous()
