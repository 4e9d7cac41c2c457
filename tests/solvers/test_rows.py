"""Rows never meet: whatever the others are, a row's result is the same but for rounding.

No library promises that a matrix product rounds a row alike wherever it stands, so every test runs twice: with this
processor's rounding, and with another's (``other_rounding``). What separates two answers is then bounded: of one
evaluation by the roundings of its sums; of solutions, stopped whenever, by their own residuals, since in a contraction
|z - z*| <= |f(z) - z| / (1 - L); and in float64 by 1e-8, which no decision of the solver comes near here.
"""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from helmholtz.solvers import Implicit, SolverConfig, solve
from helmholtz.solvers.loop import Rows
from other_rounding import OtherRounding
from solver_cases import Patterns, random_patterns

MODES = ["alternating", "simultaneous", "cascade", "picard", "anderson"]
ROUNDING = {"own": nullcontext, "other": lambda: OtherRounding(roundings=1.0)}
DTYPES = [torch.float32, torch.float64]
SAME = ["status", "num_steps", "num_evaluations", "num_products", "unstable"]
NEAR = ["value", "residual", "energy", "gradient"]
CONTRACTION = 0.9


def quiet(mode, max_steps, rtol=1e-5):
    return SolverConfig(
        mode=mode, rtol=rtol, energy_rtol=rtol, max_steps=max_steps, on_nonconvergence="ignore"
    )


def solved(problem, start, rows, settings):
    """What is said of ``rows``, and the gradient that reaches each row's own parameters."""
    u = problem.u[rows].clone().requires_grad_()
    problem = replace(problem, u=u)
    solution = solve(problem, start[rows], settings)
    value = Implicit(rtol=1e-12, on_nonconvergence="ignore").attach(problem, solution)
    (gradient,) = torch.autograd.grad(value.square().sum(), u)
    gradient = gradient * (solution.backward.residual <= 1e-12).unsqueeze(1)  # at a saddle there is none
    return {name: getattr(solution, name) for name in SAME + NEAR[:-1]} | {"gradient": gradient}


def other_neighbours(n):
    """Ways to put rows in other company: names, and indices."""
    order = torch.randperm(n)
    yield "permuted", order
    yield "duplicated", torch.cat([torch.arange(n), order])
    yield "dropped", order[: n // 3]
    yield "alone", order[:1]


def roundings(problem: Patterns, z):
    """What two evaluations of ``f`` at ``z`` can differ by, each sum taken in some order: a bound per entry."""
    eps, (n, width) = torch.finfo(z.dtype).eps, problem.patterns.shape
    z, m, strength = z.double(), problem.patterns.double(), problem.strength.double()
    scores = problem.beta * (z.abs() @ m.abs().T).amax(-1, keepdim=True) * width * eps
    weights = (problem.beta * z @ m.T).softmax(-1) @ m.abs()
    return strength * (2 * scores + 2 * (n + 8) * eps) * weights + 4 * eps * problem.map(z.to(m.dtype)).abs()


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "n_patterns"), [(7, 33), (64, 512), (512, 5000)])
def test_an_evaluation_differs_by_the_roundings_of_its_sums(width, n_patterns, dtype, rounding):
    problem = random_patterns(40, width, n_patterns, contraction=6.0, dtype=dtype)
    z = 2 * torch.randn_like(problem.u)
    wide = replace(problem, **{f.name: getattr(problem, f.name).double() for f in fields(problem)[:3]})
    bound = roundings(wide, z)
    with ROUNDING[rounding]():
        whole, energy = Rows.of(problem, z).map_and_energy(z)
        for name, rows in other_neighbours(40):
            f, e = Rows.of(problem.take(rows), z[rows]).map_and_energy(z[rows])
            assert ((f - whole[rows]).abs() <= bound[rows]).all(), name
            torch.testing.assert_close(
                e, energy[rows], rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0
            )


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_steps", [3, 100])
@pytest.mark.parametrize("mode", MODES)
def test_two_answers_are_no_further_apart_than_their_residuals_say(mode, max_steps, dtype, rounding):
    """Of a contraction, also where the solver was stopped early and where one company needed a step more."""
    problem = random_patterns(90, 64, 128, contraction=CONTRACTION, dtype=dtype)
    start = 2 * torch.randn_like(problem.u)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    with ROUNDING[rounding]():
        whole = solve(problem, start, quiet(mode, max_steps, rtol))
        assert whole.converged.all() or max_steps == 3
        for name, rows in other_neighbours(90):
            part = solve(problem.take(rows), start[rows], quiet(mode, max_steps, rtol))
            assert torch.equal(part.converged, part.residual <= rtol) or max_steps == 3
            size = whole.value[rows].norm(dim=-1) + part.value.norm(dim=-1)
            certified = (whole.residual[rows] + part.residual) * 1.5 * size
            rounded = 64 * torch.finfo(dtype).eps * size
            distance = (part.value - whole.value[rows]).norm(dim=-1)
            assert (distance <= (certified + rounded) / (1 - CONTRACTION)).all(), name


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("max_steps", [3, 40])
@pytest.mark.parametrize("mode", MODES)
def test_in_float64_neighbours_change_nothing_that_is_seen(mode, max_steps, rounding):
    """Far from a contraction too, in values, energies, steps and gradients; and other values of other rows."""
    n, settings = 60, quiet(mode, max_steps)
    # without a guard, mixing makes more of a rounding with every step it does not contract
    wild = max_steps == 3 or mode in ("alternating", "simultaneous", "picard")
    problem = random_patterns(n, 32, 48, contraction=6.0 if wild else CONTRACTION)
    start = 2 * torch.randn_like(problem.u)
    changed, elsewhere, first = problem.u.clone(), start.clone(), torch.arange(n // 2)
    changed[n // 2 :], elsewhere[n // 2 :] = torch.randn(2, n // 2, 32, dtype=torch.float64)
    with ROUNDING[rounding]():
        whole = solved(problem, start, torch.arange(n), settings)
        found = [(name, rows, solved(problem, start, rows, settings)) for name, rows in other_neighbours(n)]
        other = solved(replace(problem, u=changed), elsewhere, torch.arange(n), settings)
    found.append(("other values", first, {key: value[: n // 2] for key, value in other.items()}))
    assert whole["num_steps"].unique().numel() > 1 or max_steps == 3
    for name, rows, part in found:
        for key in SAME:
            assert torch.equal(part[key], whole[key][rows]), f"{name}: {key}"
        for key in NEAR:
            torch.testing.assert_close(
                part[key], whole[key][rows], rtol=1e-8, atol=1e-8, msg=f"{name}: {key}"
            )


@pytest.mark.parametrize("rounding", ROUNDING)
def test_a_row_without_incoming_gradient_gives_exactly_none(rounding):
    problem = random_patterns(20, 16, 24, dtype=torch.float32)
    u = problem.u.clone().requires_grad_()
    problem = replace(problem, u=u)
    with ROUNDING[rounding]():
        value = Implicit().attach(problem, solve(problem, torch.zeros_like(u), quiet("alternating", 100)))
        (gradient,) = torch.autograd.grad(value[:7].square().sum(), u)
    assert gradient[:7].any(-1).all() and not gradient[7:].any()


def test_two_threads_change_no_more():
    problem = random_patterns(300, 64, 128, contraction=CONTRACTION)
    start, settings = 2 * torch.randn_like(problem.u), quiet("alternating", 100)
    one = solve(problem, start, settings)
    torch.set_num_threads(2)
    torch.testing.assert_close(solve(problem, start, settings).value, one.value, rtol=1e-8, atol=1e-8)


def test_only_the_rows_that_go_on_are_evaluated():
    seen = []

    class Watching(Patterns):
        def map_and_energy(self, z):
            seen.append((len(z), len(self.u)))
            return super().map_and_energy(z)

        def jvp(self, z, v):
            seen.append((len(z), len(self.u)))
            return super().jvp(z, v)

    plain = random_patterns(200, 8, 20, contraction=6.0)
    problem = Watching(*(getattr(plain, f.name) for f in fields(plain)))
    for mode in MODES:
        seen.clear()
        found = solve(problem, torch.randn_like(plain.u), quiet(mode, 40))
        assert all(rows == of_problem for rows, of_problem in seen)
        if mode != "cascade":  # whose first phase evaluates no energy
            spent = int((found.num_evaluations + found.num_products).sum())
            # a look for saddles takes products too
            assert sum(rows for rows, _ in seen) == spent


def test_rows_of_rows_are_counted_where_they_belong():
    problem = random_patterns(5, 8, 20)
    rows = Rows.of(problem, problem.u)
    some = rows.take(torch.tensor([4, 1])).take(torch.tensor([1]))
    torch.testing.assert_close(some.map(problem.u[1:2]), problem.map(problem.u)[1:2])
    some.jvp(problem.u[1:2], problem.u[1:2])
    rows.map_and_energy(problem.u)
    assert rows.counts.evaluations.tolist() == [1, 2, 1, 1, 1]
    assert rows.counts.products.tolist() == [0, 1, 0, 0, 0]
