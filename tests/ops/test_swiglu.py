"""The gate of the feed-forward: against its equation, in every dtype, differentiated once and twice."""

import pytest
import torch

from helmholtz.ops.swiglu import swiglu
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 6), (2, 5, 66)], ids=str)
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


def test_gradcheck_once_and_twice() -> None:
    gate_up = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)
    assert torch.autograd.gradgradcheck(swiglu, gate_up)
    (plain,) = torch.autograd.grad(swiglu(gate_up).sin().sum(), gate_up)
    (graph,) = torch.autograd.grad(swiglu(gate_up).sin().sum(), gate_up, create_graph=True)
    torch.testing.assert_close(graph, plain)
