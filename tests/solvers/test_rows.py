"""Rows never meet: whatever the others are, a row's result is the same to the last bit."""

from dataclasses import fields, replace

import pytest
import torch

from helmholtz.solvers import Implicit, SolverConfig, solve
from helmholtz.solvers.loop import TILE, Rows
from solver_cases import random_patterns

MODES = ["alternating", "simultaneous", "cascade", "picard", "anderson"]
THREADS = [1, pytest.param(2, marks=pytest.mark.slow)]
"""Two threads wait for each other: minutes on a busy machine."""
PER_ROW = ["value", "status", "num_steps", "num_evaluations", "num_products", "residual", "energy"]
PER_ROW += ["energy_change", "unstable"]


def quiet(mode, max_steps):
    return SolverConfig(
        mode=mode, rtol=1e-5, energy_rtol=1e-5, max_steps=max_steps, on_nonconvergence="ignore"
    )


def solved(problem, start, rows, settings):
    """What is said of ``rows``, and the gradient that reaches each row's own parameters."""
    u = problem.u[rows].clone().requires_grad_()
    problem = replace(problem, u=u)
    solution = solve(problem, start[rows], settings)
    value = Implicit(on_nonconvergence="ignore").attach(problem, solution)
    (gradient,) = torch.autograd.grad(value.square().sum(), u)
    return {name: getattr(solution, name) for name in PER_ROW} | {"gradient": gradient}


def other_neighbours(n):
    """Ways to put rows in other company: indices, and where the first rows are found again."""
    order = torch.randperm(n)
    yield "permuted", order, order
    yield "duplicated", torch.cat([torch.arange(n), order]), torch.cat([torch.arange(n), order])
    few = order[: n // 3]
    yield "dropped", few, few
    yield "alone", order[:1], order[:1]


def check(width, n_patterns, dtype, settings, n=150, contraction=6.0):
    problem = random_patterns(n, width, n_patterns, contraction=contraction, dtype=dtype)
    start = torch.randn_like(problem.u) * 2
    everything = solved(problem, start, torch.arange(n), settings)
    assert everything["num_steps"].unique().numel() > 1 or settings.max_steps <= 3
    for name, rows, same in other_neighbours(n):
        for key, value in solved(problem, start, rows, settings).items():
            assert torch.equal(value, everything[key][same]), f"{name}: {key}"
    changed, first = torch.randn_like(problem.u), n // 2
    changed[:first] = problem.u[:first]
    elsewhere = torch.cat([start[:first], 5 * torch.randn_like(start[first:])])
    for key, value in solved(replace(problem, u=changed), elsewhere, torch.arange(n), settings).items():
        assert torch.equal(value[:first], everything[key][:first]), f"other values: {key}"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_steps", [3, 40])
@pytest.mark.parametrize("mode", MODES)
def test_narrow_rows(mode, max_steps, dtype, threads):
    torch.set_num_threads(threads)
    check(64, 512, dtype, quiet(mode, max_steps))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "n_patterns"), [(64, 5000), (512, 512), (512, 5000)])
@pytest.mark.parametrize("mode", ["alternating", "simultaneous"])
def test_wide_rows(mode, width, n_patterns, dtype, threads):
    torch.set_num_threads(threads)
    check(width, n_patterns, dtype, quiet(mode, 8), n=80)


def test_every_evaluation_has_whole_tiles():
    seen = []

    class Watching(type(random_patterns(1, 8, 5))):
        def map_and_energy(self, z):
            seen.append((len(z), len(self.u)))
            return super().map_and_energy(z)

        def jvp(self, z, v):
            seen.append((len(z), len(self.u)))
            return super().jvp(z, v)

    plain = random_patterns(200, 8, 20, contraction=6.0)
    problem = Watching(*(getattr(plain, f.name) for f in fields(plain)))
    for mode in MODES:
        solve(problem, torch.randn_like(plain.u), quiet(mode, 40))
    assert {rows % TILE for rows, _ in seen} == {0}
    assert all(rows == of_problem for rows, of_problem in seen)
    assert len({rows for rows, _ in seen}) > 1  # rows that have converged are left out


def test_rows_of_rows_are_counted_where_they_belong():
    problem = random_patterns(5, 8, 20)
    rows = Rows.of(problem, problem.u)
    some = rows.take(torch.tensor([4, 1])).take(torch.tensor([1]))
    torch.testing.assert_close(some.map(problem.u[1:2]), problem.map(problem.u)[1:2])
    some.jvp(problem.u[1:2], problem.u[1:2])
    rows.map_and_energy(problem.u)
    assert rows.counts.evaluations.tolist() == [1, 2, 1, 1, 1]
    assert rows.counts.products.tolist() == [0, 1, 0, 0, 0]
