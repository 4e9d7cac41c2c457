"""Where no values are, or a look costs, the solver makes more steps and says of every row what it says elsewhere."""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from helmholtz._values import few_reads
from helmholtz.solvers import Implicit, SolverConfig, loop, modes, solve
from helmholtz.solvers.base import MODES, Status
from host_reads import HostReads
from solver_cases import random_patterns

SAME = ("status", "num_steps", "num_evaluations", "num_products")
NEAR = ("value", "residual", "energy", "energy_change")


@pytest.fixture
def blind(monkeypatch):
    def switch(*_: torch.Tensor) -> bool:
        return False

    def on() -> None:
        for module in (loop, modes):
            monkeypatch.setattr(module, "has_values", switch)
            monkeypatch.setattr(module, "worth_reading", switch)

    return on


@pytest.mark.parametrize("mode", MODES)
def test_steps_after_a_row_is_done_change_nothing(mode, blind):
    problem = random_patterns(40, 6, 8)
    start = torch.randn(40, 6, dtype=torch.float64) * torch.logspace(-1, 1, 40, dtype=torch.float64)[:, None]
    problem.u[7] = torch.nan
    config = SolverConfig(mode=mode, max_steps=10, rtol=1e-5, energy_rtol=1e-5, on_nonconvergence="ignore")
    u = problem.u.clone().requires_grad_()
    problem, results = replace(problem, u=u), []
    for _ in range(2):
        with pytest.warns(UserWarning) if not results else torch.enable_grad():
            solution = solve(problem, start, config)
        value = Implicit(on_nonconvergence="ignore").attach(problem, solution)
        results.append((solution, *torch.autograd.grad(value.square().sum(), u)))
        blind()
    (seen, gradient), (unseen, its_gradient) = results
    assert len(seen.num_steps.unique()) > 1 and seen.status[7] == Status.NONFINITE
    assert {f.name for f in fields(seen)} >= {*SAME, *NEAR}
    for name in SAME:
        assert torch.equal(getattr(seen, name), getattr(unseen, name)), name
    for name in NEAR:
        torch.testing.assert_close(
            getattr(unseen, name), getattr(seen, name), rtol=1e-9, atol=1e-9, equal_nan=True
        )
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert not unseen.residual_history


@pytest.mark.parametrize("mode", MODES)
def test_few_reads_give_the_same_solution(mode):
    """The way of a GPU. 30 steps at most, and as many products backward: a look at every fourth."""
    problem = random_patterns(40, 6, 8)
    start = torch.randn(40, 6, dtype=torch.float64) * torch.logspace(-1, 1, 40, dtype=torch.float64)[:, None]
    config = SolverConfig(mode=mode, rtol=1e-5, energy_rtol=1e-5)
    u, results, counts = problem.u.clone().requires_grad_(), [], []
    problem = replace(problem, u=u)
    for context in (nullcontext(), few_reads()):
        with context, HostReads() as count:
            solution = solve(problem, start, config)
            value = Implicit(on_nonconvergence="warn").attach(problem, solution)
            results.append((solution, *torch.autograd.grad(value.square().sum(), u)))
        counts.append(len(count.seen))
    (seen, gradient), (unseen, its_gradient) = results
    for name in SAME[:3]:  # products are also made to look for saddles
        assert torch.equal(getattr(seen, name), getattr(unseen, name)), name
    for name in NEAR:
        torch.testing.assert_close(getattr(unseen, name), getattr(seen, name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-9, atol=1e-9)
    assert (
        counts[1] <= counts[0] / 2
    )  # a look is one read, and one more if rows are done; a guarded step looks as well
