"""Second derivatives of everything with a backward pass of its own: right, or refused with the reason; never wrong."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import helmholtz
from derivative_cases import REFUSAL, WARNINGS, assert_right_or_refused
from helmholtz import ops
from helmholtz._once import DifferentiableOnce, mark_as_once
from helmholtz.ops._logcosh import log_cosh_quotient
from helmholtz.ops.causal_conv import causal_conv
from helmholtz.ops.free_energy import softmax_read, tilt_values
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.losses import cross_entropy
from helmholtz.ops.modulate import modulated_split
from helmholtz.ops.rms_norm import rms_norm
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.rope import rope_table, rotate, rotate_split
from helmholtz.ops.scan import first_order_scan
from helmholtz.ops.selective_scan import selective_scan
from helmholtz.ops.ssd import ssd
from helmholtz.ops.swiglu import swiglu


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return normal(*shape).sigmoid()


@dataclass
class Case:
    call: Callable[..., object]
    inputs: list[Tensor]


TABLE = rope_table(torch.arange(3), 4)
CODES = torch.tensor([[0, 3, 1]])


def cases() -> dict[str, Case]:
    """By the function that is differentiated, ``module.class``, and the ways in that have none of their own."""
    torch.manual_seed(0)
    once = {
        "causal_conv": Case(
            lambda x, w, b, s: causal_conv(x, w, b, state=s, activation="silu"),
            [normal(2, 4, 3), normal(3, 3), normal(3), normal(2, 2, 3)],
        ),
        "tilt_values": Case(
            lambda v, beta: tilt_values(v, beta, cap=40.0), [normal(1, 2, 3, 2), positive(2, 2)]
        ),
        "modulated_split": Case(
            lambda x, s: tuple(modulated_split(x, s, [1, 3])), [normal(1, 3, 4), normal(1, 3, 4)]
        ),
        "softmax_read": Case(
            lambda q, k, v, beta: softmax_read(q, k, v, beta, cap=40.0),
            [normal(1, 2, 3, 2), normal(1, 1, 3, 2), normal(1, 1, 3, 2), 1 + positive(1, 2)],
        ),
        "gated_read": Case(gated_read, [
            positive(1, 3, 2, 2, 2), 1 + positive(2, 2), normal(1, 3, 2, 2), normal(1, 3, 2, 2),
        ]),
        "rnn_softmax": Case(
            lambda k, x, s: averages(k, x, s), [normal(1, 4, 2), normal(1, 4, 2, 2), positive(1, 3, 2)]
        ),
        "scan": Case(
            lambda a, x, s: first_order_scan(a, x, state=s), [positive(1, 4, 2), normal(1, 4, 2), normal(1, 2)]
        ),
        "cross_entropy": Case(lambda x: cross_entropy(x, CODES), [normal(1, 3, 5)]),
        "selective_scan": Case(
            lambda *x: selective_scan(*x[:-1], state=x[-1]),
            [normal(1, 3, 2, 2), positive(1, 3, 2), -positive(2, 3), normal(1, 3, 3), normal(1, 3, 3), normal(2),
             normal(1, 2, 2, 3)],
        ),
        "softmax_attention": Case(ops.softmax_attention, [normal(1, 2, 3, 2) for _ in range(3)]),
        "softmax_attention with a mask": Case(
            lambda q, k, v: ops.softmax_attention(q, k, v, key_mask=torch.tensor([[True, False, True]])),
            [normal(1, 2, 3, 2) for _ in range(3)],
        ),
        "softmax_attention of packed sequences": Case(
            lambda q, k, v: ops.softmax_attention(q, k, v, cu_seqlens=torch.tensor([0, 1, 3])),
            [normal(1, 2, 3, 2) for _ in range(3)],
        ),
        "masked_free_energy": Case(
            lambda q, k, v, beta: ops.masked_free_energy(q, k, v, beta, mask=torch.eye(3) < 1),
            [normal(1, 2, 3, 2), normal(1, 1, 3, 2), normal(1, 1, 3, 2), 1 + positive(1, 2)],
        ),
    }  # fmt: skip
    often = {
        "masked_free_energy with a learned mask": Case(
            lambda q, k, v, beta, mask: ops.masked_free_energy(q, k, v, beta, mask=mask),
            [normal(1, 2, 3, 2), normal(1, 1, 3, 2), normal(1, 1, 3, 2), 1 + positive(1, 2), normal(3, 3)],
        ),
        "ssd": Case(
            lambda *x: ssd(*x[:-1], state=x[-1], chunk=2),
            [
                normal(1, 5, 2, 2),
                positive(1, 5, 2),
                -positive(2),
                normal(1, 5, 3),
                normal(1, 5, 3),
                normal(2),
                normal(1, 2, 2, 3),
            ],
        ),
        "linear_attention": Case(
            lambda q, k, v, g, s: ops.linear_attention(q, k, v, -g.sigmoid(), state=s, chunk_size=2),
            [normal(1, 1, 4, 2), normal(1, 1, 4, 2), normal(1, 1, 4, 3), normal(1, 1, 4), normal(1, 1, 2, 3)],
        ),
        "linear_attention by channel": Case(
            lambda q, k, v, g: ops.linear_attention(q, k, v, -g.sigmoid(), chunk_size=2)[0],
            [normal(1, 1, 4, 2), normal(1, 1, 4, 2), normal(1, 1, 4, 3), normal(1, 1, 4, 2)],
        ),
        "kl_per_bit": Case(ops.kl_per_bit, [normal(2, 3)]),
        "swiglu": Case(swiglu, [normal(2, 4)]),
        "rms_norm": Case(lambda x, w: rms_norm(x, w, eps=1e-3), [normal(2, 4), normal(4)]),
        "rotate": Case(lambda x: rotate(x, *TABLE).sin(), [normal(1, 1, 3, 4)]),
        "rotate_split": Case(
            lambda x: tuple(y.sin() for y in rotate_split(x, *TABLE, 1, 1)), [normal(1, 3, 3, 4)]
        ),
        "_logcosh._Quotient": Case(log_cosh_quotient, [normal(3), 1 + positive(3), normal(3)]),
    }
    return once | often


def averages(k: Tensor, signals: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    averaged, state = rnn_softmax(k, signals, state=RNNSoftmaxState(torch.zeros_like(sums[:, 0]), sums))
    return averaged, state.sums * state.max.exp().unsqueeze(1)  # in units that do not move with the keys


CASES = cases()

pytestmark = WARNINGS


def functions() -> dict[str, type[torch.autograd.Function]]:
    """All of the package."""
    root = Path(helmholtz.__file__).parent
    for file in root.rglob("*.py"):
        if re.search(
            r"^class .*(autograd\.Function|DifferentiableOnce)\)", file.read_text("utf-8"), re.MULTILINE
        ):
            importlib.import_module(".".join(("helmholtz", *file.relative_to(root).with_suffix("").parts)))
    found, todo = {}, [torch.autograd.Function]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("helmholtz.") and cls is not DifferentiableOnce:
            found[f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"] = cls
    return found


FUNCTIONS = functions()
KERNELS = {
    "causal_conv",
    "cross_entropy",
    "gated_read",
    "linear_attention",
    "masked_free_energy",
    "modulated_split",
    "rms_norm",
    "rnn_softmax",
    "rotate",
    "rotate_split",
    "scan",
    "selective_scan",
    "softmax_attention",
    "softmax_attention of packed sequences",
    "softmax_attention with a mask",
    "softmax_read",
    "ssd",
    "swiglu",
    "tilt_values",
}
"""What is refused by a kernel and right in its plain form."""
REFUSED = {name for name, cls in FUNCTIONS.items() if issubclass(cls, DifferentiableOnce)}


def test_every_function_with_a_backward_pass_of_its_own_is_tried() -> None:
    elsewhere = {"adjoint._Implicit"}  # tests/solvers/test_adjoint.py
    assert FUNCTIONS.keys() - elsewhere <= CASES.keys(), "second derivatives are right or refused: add a case"
    assert FUNCTIONS.keys() >= elsewhere


def weighted(case: Case) -> Callable[..., Tensor]:
    """All outputs, times constants: what a gradient depends on, it depends on by saved tensors alone."""
    generator = torch.Generator().manual_seed(1)
    outputs = case.call(*case.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]

    def call(*inputs: Tensor) -> Tensor:
        outputs = case.call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))

    return call


@pytest.mark.parametrize("name", CASES)
def test_no_pair_of_inputs_has_a_wrong_second_derivative(name: str, form: str) -> None:
    case, f = CASES[name], weighted(CASES[name])
    generator = torch.Generator().manual_seed(2)
    n, n_refused = len(case.inputs), 0
    for i, j in product(range(n), repeat=2):
        w = torch.randn(case.inputs[i].shape, generator=generator, dtype=torch.float64)

        def gradient(x: Tensor, *, graph: bool, i: int = i, j: int = j, w: Tensor = w) -> Tensor:
            leaves = [x if k == j else y.detach().clone().requires_grad_() for k, y in enumerate(case.inputs)]
            return (torch.autograd.grad(f(*leaves), leaves[i], create_graph=graph)[0] * w).sum()

        x = case.inputs[j].clone().requires_grad_()
        first, second = gradient(x, graph=True), None
        try:
            if first.requires_grad:
                (second,) = torch.autograd.grad(first, x, allow_unused=True)
        except RuntimeError as error:
            assert re.search(REFUSAL, str(error)), error
            n_refused += 1
            continue
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        ends = [gradient((x + s * v).detach().requires_grad_(), graph=False) for s in (1e-5, -1e-5)]
        expected = (ends[0] - ends[1]) / 2e-5
        actual = torch.zeros(()).double() if second is None else (second * v).sum()
        torch.testing.assert_close(
            actual, expected, rtol=1e-6, atol=1e-7, msg=f"{i}, {j}: {actual}, not {expected}"
        )
    assert bool(n_refused) == (name in (REFUSED | KERNELS if form == "kernel" else REFUSED))


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_one_input_alone_depends_on_what_comes_in(name: str) -> None:
    """It is linear in the incoming gradient, also where nothing that was saved has a gradient."""
    case = CASES[name]
    for i in range(len(case.inputs)):
        leaves = [x.detach().clone().requires_grad_(k == i) for k, x in enumerate(case.inputs)]
        outputs = case.call(*leaves)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
        incoming = [torch.randn_like(x).requires_grad_() for x in outputs]
        (first,) = torch.autograd.grad(outputs, leaves[i], incoming, create_graph=True)
        total = (first * torch.randn_like(first)).sum()
        try:
            found = torch.autograd.grad(total, incoming, materialize_grads=True)
        except RuntimeError as error:
            assert re.search(REFUSAL, str(error)), f"{i}: {error}"
        else:
            again = sum((x * y).sum() for x, y in zip(found, incoming, strict=True))
            torch.testing.assert_close(again, total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_route_refuses_with_the_reason_or_is_right(name: str) -> None:
    case, f = CASES[name], weighted(CASES[name])
    x = torch.cat([y.flatten() for y in case.inputs])
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def of_all(x: Tensor) -> Tensor:
        parts = x.split([y.numel() for y in case.inputs])
        return f(*(part.view_as(y) for part, y in zip(parts, case.inputs, strict=True))).square()

    assert_right_or_refused(of_all, x, v)


@pytest.mark.parametrize("name", sorted(REFUSED & CASES.keys()))
def test_under_checkpointing_too(name: str) -> None:
    f, inputs = weighted(CASES[name]), [x.clone().requires_grad_() for x in CASES[name].inputs]
    expected = torch.autograd.grad(f(*inputs), inputs)
    total = checkpoint(f, *inputs, use_reentrant=False)
    first = torch.autograd.grad(total, inputs, create_graph=True)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


def test_kernels_of_other_packages_refuse_a_graph_of_their_backward_pass() -> None:
    x = normal(3).requires_grad_()
    y = x.square()
    mark_as_once("flash_attn", y, normal(2))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first, 2 * x)
    with pytest.raises(RuntimeError, match="backend 'flash_attn' is differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
