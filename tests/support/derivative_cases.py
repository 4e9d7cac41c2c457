"""Every way to ask for a second derivative, and whether what it gives is one."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, hvp, vhp

Scalar = Callable[[Tensor], Tensor]

REFUSAL = (
    "is differentiable once|has no second derivative|derivative for (aten|helmholtz)::.* is not implemented|"
    + ("forward AD with _scaled_dot_product")
)
"""What names the reason: ours, or that of torch's own attention."""


def _gradient(f: Scalar, x: Tensor) -> Tensor:
    return torch.autograd.grad(f(x), x, create_graph=True)[0]


def _by_grad_twice(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.grad((_gradient(f, x) * v).sum(), x)[0]


def _by_grad_of_a_penalty(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    g = _gradient(f, x)
    return torch.autograd.grad(g, x, grad_outputs=v)[0]


def _by_backward_twice(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    f(x).backward(create_graph=True)
    assert x.grad is not None
    first, x.grad = x.grad, None
    (first * v).sum().backward()
    return x.grad


WARNINGS = [  # of torch: its forward mode, and a leaf that holds its gradient's graph
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph"),
]

ROUTES: dict[str, Callable[[Scalar, Tensor, Tensor], Tensor]] = {
    "grad twice": _by_grad_twice,
    "grad of a penalty": _by_grad_of_a_penalty,
    "backward twice": _by_backward_twice,
    "functional.hvp": lambda f, x, v: hvp(f, x, v)[1],
    "functional.vhp": lambda f, x, v: vhp(f, x, v)[1],
    "functional.hessian": lambda f, x, v: (hessian(f, x).view(x.numel(), -1) @ v.flatten()).view_as(x),
    "func.grad twice": lambda f, x, v: torch.func.grad(lambda y: (torch.func.grad(f)(y) * v).sum())(x),
    "func.hessian": lambda f, x, v: (torch.func.hessian(f)(x).reshape(x.numel(), -1) @ v.flatten()).view_as(
        x
    ),
    "func.jacrev of grad": lambda f, x, v: (
        torch.func.jacrev(torch.func.grad(f))(x).reshape(x.numel(), -1) @ v.flatten()
    ).view_as(x),
    "func.jvp of grad": lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: _forward_over_reverse(f, x, v),
}
"""``route(f, x, v)``: the Hessian of ``f`` at ``x`` times ``v``. ``x`` is a leaf that requires a gradient."""


def _forward_over_reverse(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach().requires_grad_(), v)
        (g,) = torch.autograd.grad(f(dual), dual, create_graph=True)
        tangent = forward_ad.unpack_dual(g).tangent
        return torch.zeros_like(x) if tangent is None else tangent


def by_differences(f: Scalar, x: Tensor, v: Tensor, *, step: float = 1e-5) -> Tensor:
    """The Hessian of ``f`` times ``v`` from first derivatives, in float64; its error falls as ``step ** 4``: of
    differences of two steps the part that falls as their square is taken away (Richardson)."""

    def first(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(f(y), y)[0]

    def central(h: float) -> Tensor:
        return (first(x + h * v) - first(x - h * v)) / (2 * h)

    return (4 * central(step) - central(2 * step)) / 3


def assert_right_or_refused(
    f: Scalar, x: Tensor, v: Tensor, *, rtol: float = 1e-5, expected: Tensor | None = None
) -> None:
    """By every route. ``expected`` is that of differences where it is not given."""
    for name, route in ROUTES.items():
        try:
            actual = route(f, x.detach().clone().requires_grad_(), v)
        except RuntimeError as error:
            assert re.search(REFUSAL, str(error)), f"{name}: {error}"
        else:
            expected = by_differences(f, x, v) if expected is None else expected
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
