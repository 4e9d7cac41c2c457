"""The step rules against plain linear algebra."""

import pytest
import torch

from helmholtz.solvers import SolverConfig, solve
from helmholtz.solvers.anderson import Anderson
from helmholtz.solvers.loop import Point, Rows, decreases, evaluate
from helmholtz.solvers.newton_cg import Newton, conjugate_gradients
from solver_cases import Quadratic, quadratic, random_patterns


def point_at(problem, z):
    """As the solver evaluates it."""
    return evaluate(Rows.of(problem, z), z, None)


def mixing_of(problem, iterates, window):
    mixing = Anderson(window)
    for z in iterates:
        mixing.remember(point_at(problem, z))
    return mixing


def test_a_mixture_has_the_smallest_residual_of_all_that_sum_to_one():
    problem = random_patterns(9, 16, 40)
    iterates = [torch.randn_like(problem.u) for _ in range(5)]
    mixed = mixing_of(problem, iterates, 3).mix()
    z = torch.stack(iterates[-3:], 1)
    f = torch.stack([problem.map(x) for x in iterates[-3:]], 1)
    r = f - z
    for row in range(9):
        differences = (r[row, :2] - r[row, 2]).T
        first = torch.linalg.lstsq(differences, -r[row, 2].unsqueeze(1)).solution.squeeze(1)
        weights = torch.cat([first, 1 - first.sum(0, keepdim=True)])
        torch.testing.assert_close(mixed[row], weights @ f[row], rtol=1e-3, atol=1e-3)


def test_mixing_solves_a_linear_problem_in_as_many_steps_as_it_has_eigenvalues():
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    values = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).repeat(4)
    problem = Quadratic(torch.randn(20, 12, dtype=torch.float64), (basis * values) @ basis.T)
    start = torch.zeros_like(problem.u)
    settings = {"rtol": 1e-5, "energy_rtol": 1e-3, "max_steps": 200}
    assert solve(problem, start, SolverConfig(mode="anderson", **settings)).num_steps.max() <= 6
    assert solve(problem, start, SolverConfig(mode="picard", **settings)).num_steps.min() > 50


def test_a_window_of_one_is_the_plain_iteration():
    problem = random_patterns(9, 16, 40)
    z = torch.randn_like(problem.u)
    assert torch.equal(mixing_of(problem, [z, 2 * z], 1).mix(), point_at(problem, 2 * z).f)


def test_a_row_starts_anew_where_it_was_refused_or_grew():
    problem = random_patterns(9, 16, 40)
    good = solve(problem, problem.u, SolverConfig(mode="picard", rtol=1e-9)).value
    near, far = good + 1e-3, good.clone()
    far[4] += 1
    mixing = mixing_of(problem, [near, far], 5)
    grown = point_at(problem, far).f
    assert torch.equal(mixing.mix()[4], grown[4])
    assert not (mixing.mix() == grown).all(1)[:4].any()
    refused = torch.arange(9) == 2
    mixing.restart(refused)
    assert torch.equal((mixing.mix() == grown).all(1), refused | (torch.arange(9) == 4))


def test_rows_that_leave_take_their_memory_with_them():
    problem = random_patterns(9, 16, 40)
    iterates = [torch.randn_like(problem.u) for _ in range(3)]
    kept = torch.tensor([7, 2])
    mixing = mixing_of(problem, iterates, 5)
    everything = mixing.mix()
    mixing.take(kept)
    torch.testing.assert_close(mixing.mix(), everything[kept], rtol=1e-12, atol=1e-12)


def test_overflow_in_the_memory_falls_back_to_the_map():
    problem = random_patterns(3, 16, 40, dtype=torch.float32)
    iterates = [problem.u.clone(), problem.u.clone()]
    iterates[0][1] *= 1e30
    mixed = mixing_of(problem, iterates, 5).mix()
    assert mixed.isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_conjugate_gradients_solve_the_system_whatever_its_scale(dtype, scale):
    problem = quadratic(70, 12, largest=0.9, dtype=dtype)
    v = torch.randn_like(problem.u) * scale
    v[3] = 0
    rows = Rows.of(problem, v)
    found = conjugate_gradients(rows, problem.u, v, rtol=1e-6, max_steps=40)
    exact = torch.linalg.solve(torch.eye(12).double() - problem.a.double(), v.double(), left=False)
    assert ((found.value.double() - exact).norm(dim=1) <= 2e-5 * exact.norm(dim=1)).all()
    assert found.num_steps[3] == 0 and (found.num_steps[:3] > 3).all()
    assert torch.equal(rows.counts.products, found.num_steps)
    assert (found.residual <= 1e-6).all() and not found.indefinite.any()


def test_conjugate_gradients_tell_of_steps_and_curvature_that_did_not_suffice():
    problem = quadratic(70, 12, largest=0.9)
    v = torch.randn_like(problem.u)
    found = conjugate_gradients(Rows.of(problem, v), problem.u, v, rtol=1e-6, max_steps=2)
    left = v - (found.value - problem.jvp(problem.u, found.value))
    torch.testing.assert_close(found.residual, left.norm(dim=1) / v.norm(dim=1))
    assert (found.residual > 1e-6).all()
    saddle = quadratic(70, 12, largest=1.5)
    found = conjugate_gradients(Rows.of(saddle, v), saddle.u, v, rtol=1e-6, max_steps=40)
    assert found.indefinite.all()


def test_a_newton_step_is_exact_on_a_quadratic_and_plain_where_curvature_is_negative():
    problem = quadratic(70, 12)
    start = torch.zeros_like(problem.u)
    rows = Rows.of(problem, start)
    moved = Newton(50).propose(rows, evaluate(rows, start, None), 0)
    error = (problem.map(moved) - moved).norm(dim=1) / problem.u.norm(dim=1)
    assert error.max() < 1e-2
    saddle = quadratic(70, 12, largest=1.5)
    rows = Rows.of(saddle, start)
    point = evaluate(rows, start, None)
    assert torch.equal(Newton(50).propose(rows, point, 0), point.f)


def point(z, f, energy):
    z, f, energy = (torch.tensor(x, dtype=torch.float64) for x in (z, f, energy))
    return Point(z, f, energy, energy, energy)


def test_a_decrease_has_to_be_sufficient_and_more_than_rounding():
    old = point([[0.0]] * 4, [[1.0]] * 4, [0.0] * 4)
    wanted = 1e-4  # of |grad E| |dz| = 1
    new = point([[1.0]] * 4, [[1.0]] * 4, [-2 * wanted, -wanted / 2, 1e-9, float("nan")])
    assert decreases(old, new).tolist() == [True, False, False, False]


def test_within_rounding_the_gradients_decide():
    tiny = 1e-9
    old = point([[0.0]] * 3, [[tiny]] * 3, [1.0] * 3)
    new = point([[tiny]] * 3, [[tiny], [-2 * tiny], [tiny]], [1.0 + 4e-16, 1.0 + 4e-16, 1.0 + 1e-12])
    assert decreases(old, new).tolist() == [True, False, False]
