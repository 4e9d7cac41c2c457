"""What holds for every recurrence: its reference, its splits, its causality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from helpers import DTYPES, SHAPES, assert_matches, grads

Call = Callable[[Sequence[Tensor], Sequence[Tensor] | None, Tensor | None], tuple[Tensor, ...]]

CASES = [(*case, True) for case in product(SHAPES, DTYPES)] + [
    (shape, torch.float32, False) for shape in SHAPES
]
"""Shape, dtype, whether sequences restart inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """An op and its reference, both called as ``(inputs, state, reset) -> (out, *state)``."""

    op: Call
    oracle: Call
    make: Callable[[int, int], list[Tensor]]
    """Inputs for a batch size and a length."""
    make_state: Callable[[int], list[Tensor]]
    time: tuple[int | None, ...]
    """Time dimension of each input; None where it has none."""
    out_time: int
    free: int | None = None
    """Number of state tensors, counted from the end, that are differentiated (all by default)."""

    def cut(self, inputs: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
        pairs = zip(inputs, self.time, strict=True)
        return [x if dim is None else x.narrow(dim, start, length) for x, dim in pairs]


def random_reset(batch: int, time: int) -> Tensor:
    """Restarts at random, among them the first step of row 0 and two in a row."""
    reset = torch.rand(batch, time) < 0.1
    reset[0, 0] = True
    reset[-1, time // 2 : time // 2 + 2] = True
    return reset


def check_reference(
    problem: Recurrence, shape: tuple[int, int], dtype: torch.dtype, with_reset: bool, *, budget: float
) -> None:
    """Outputs, last state and every gradient, those of and through the state included."""
    inputs = [x.to(dtype) for x in problem.make(*shape)]
    wide = torch.promote_types(dtype, torch.float32)
    state = [x.to(wide) for x in problem.make_state(shape[0])]
    reset = random_reset(*shape) if with_reset else None
    fixed = state[: len(state) - problem.free] if problem.free is not None else []
    leaves = [*inputs, *state[len(fixed) :]]

    def call(f: Call, held: Sequence[Tensor], *xs: Tensor) -> tuple[Tensor, ...]:
        out, *last = f(xs[: len(inputs)], [*held, *xs[len(inputs) :]], reset)
        return out, *last[len(held) :]

    def actual(*xs: Tensor) -> tuple[Tensor, ...]:
        return call(problem.op, fixed, *xs)

    def expected(*xs: Tensor) -> tuple[Tensor, ...]:
        return call(problem.oracle, [x.double() for x in fixed], *xs)

    exact = [x.double() for x in leaves]
    outputs = actual(*leaves)
    assert outputs[0].dtype == dtype and all(x.dtype == wide for x in outputs[1:])
    for i, (a, e) in enumerate(zip(outputs, expected(*exact), strict=True)):
        assert_matches(f"output {i}", a, e, budget=budget)
    cotangents = [torch.randn_like(x).double() for x in outputs]
    got, want = grads(actual, leaves, cotangents), grads(expected, exact, cotangents)
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        assert_matches(f"gradient {i}", a, e, budget=budget)


def check_splits(problem: Recurrence, *, budget: float, length: int = 37) -> None:
    """Two calls that carry the state equal one, wherever they meet."""
    inputs, state = problem.make(2, length), problem.make_state(2)
    reset = random_reset(2, length)
    whole = problem.op(inputs, state, reset)
    for t in range(length + 1):
        left, *middle = problem.op(problem.cut(inputs, 0, t), state, reset[:, :t])
        right, *last = problem.op(problem.cut(inputs, t, length - t), middle, reset[:, t:])
        for i, (a, e) in enumerate(
            zip([torch.cat([left, right], problem.out_time), *last], whole, strict=True)
        ):
            assert_matches(f"split at {t}, output {i}", a, e, budget=budget)


def check_causality(problem: Recurrence, *, length: int = 150) -> None:
    """A future a thousand times larger changes no bit of the past, and the past has no gradient there."""
    inputs = [x.requires_grad_() for x in problem.make(2, length)]
    for t in (1, 63, 64, 100):
        with torch.no_grad():
            other = [x.detach().clone() for x in inputs]
            for x, dim in zip(other, problem.time, strict=True):
                if dim is not None:
                    x.narrow(dim, t, length - t).mul_(1e3)
        past = problem.op(inputs, None, None)[0].narrow(problem.out_time, 0, t)
        assert torch.equal(past, problem.op(other, None, None)[0].narrow(problem.out_time, 0, t))
        moving = [i for i, dim in enumerate(problem.time) if dim is not None]
        found = torch.autograd.grad(past.square().sum(), [inputs[i] for i in moving])
        for i, g in zip(moving, found, strict=True):
            assert not g.narrow(problem.time[i] or 0, t, length - t).any()
            assert t == 1 or g.any()


def check_reset_isolates(problem: Recurrence) -> None:
    """From a restart on, the step before is as good as unwritten: state and inputs leave no trace or gradient."""
    inputs, state = problem.make(1, 70), problem.make_state(1)
    reset = torch.zeros(1, 70, dtype=torch.bool)
    reset[0, 41] = True
    alone, *last_alone = problem.op(problem.cut(inputs, 41, 29), None, None)
    packed, *last = problem.op(inputs, state, reset)
    for a, e in zip([packed.narrow(problem.out_time, 41, 29), *last], [alone, *last_alone], strict=True):
        assert_matches("after the restart", a, e, budget=2.6)  # worst measured: 0.86 eps
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    tail = problem.op(leaves, state, reset)[0].narrow(problem.out_time, 41, 29)
    moving = [i for i, dim in enumerate(problem.time) if dim is not None]
    for i, g in zip(
        moving, torch.autograd.grad(tail.square().sum(), [leaves[i] for i in moving]), strict=True
    ):
        assert not g.narrow(problem.time[i] or 0, 0, 41).any()


def check_plain(problem: Recurrence) -> None:
    """An empty call hands the state on; autocast and gradients change no bit; no input is written."""
    inputs, state = problem.make(2, 70), problem.make_state(2)
    empty, *handed_on = problem.op(problem.cut(inputs, 0, 0), state, None)
    assert empty.shape[problem.out_time] == 0
    assert all(torch.equal(a, e) for a, e in zip(handed_on, state, strict=True))
    kept = [x.clone() for x in (*inputs, *state)]
    plain = problem.op(inputs, state, None)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = problem.op(inputs, state, None)
    strided = problem.op([torch.stack([x, x], -1)[..., 0] for x in inputs], state, None)
    leaves = [x.clone().requires_grad_() for x in inputs]
    differentiated = problem.op(leaves, state, None)
    differentiated[0].sum().backward()
    for i, e in enumerate(plain):
        assert torch.equal(under_autocast[i], e) and torch.equal(differentiated[i], e)
        assert_matches("strided", strided[i], e, budget=4)
    assert all(torch.equal(a, e) for a, e in zip((*inputs, *state), kept, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(leaves, inputs, strict=True))


def check_gradients_numerically(problem: Recurrence) -> None:
    """`torch.autograd.gradcheck` in float64, with a restart inside."""
    inputs, state = ([x.double() for x in xs] for xs in (problem.make(1, 6), problem.make_state(1)))
    reset = torch.tensor([[False, False, False, True, False, False]])
    free = len(state) if problem.free is None else problem.free
    fixed = state[: len(state) - free]
    leaves = [x.requires_grad_() for x in (*inputs, *state[len(fixed) :])]

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        out, *last = problem.op(xs[: len(inputs)], [*fixed, *xs[len(inputs) :]], reset)
        return out, *last[len(fixed) :]

    assert torch.autograd.gradcheck(call, leaves)


class RecurrenceTests:
    """What every recurrence is tested for; a test class inherits it and names its problems and its budget."""

    problems: ClassVar[dict[str, Recurrence]]
    budget: ClassVar[float]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "problem" in metafunc.fixturenames:
            metafunc.parametrize("problem", list(self.problems.values()), ids=list(self.problems))

    @pytest.mark.parametrize(("shape", "dtype", "with_reset"), CASES, ids=str)
    def test_matches_reference(self, problem, shape, dtype, with_reset):
        check_reference(problem, shape, dtype, with_reset, budget=self.budget)

    def test_split_anywhere_equals_one_call(self, problem):
        check_splits(problem, budget=self.budget)

    def test_future_leaves_the_past_alone(self, problem):
        check_causality(problem)

    def test_reset_isolates(self, problem):
        check_reset_isolates(problem)

    def test_empty_strided_autocast_unwritten(self, problem):
        check_plain(problem)

    def test_gradcheck(self, problem):
        check_gradients_numerically(problem)
