"""Gradients through equilibria against long unrolled iterations, and what they cost."""

import warnings
from dataclasses import replace

import pytest
import torch

from helmholtz.solvers import (
    AbstractProblem,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    Phantom,
    SolverConfig,
    Unrolled,
    solve,
)
from solver_cases import Patterns, quadratic, random_patterns

TIGHT = SolverConfig(rtol=1e-12, energy_rtol=1e-12, max_steps=200, on_nonconvergence="raise")


def differentiable(problem):
    u, patterns, strength = (
        x.detach().clone().requires_grad_() for x in (problem.u, problem.patterns, problem.strength)
    )
    return Patterns(u, patterns, strength, problem.beta), [u, patterns, strength]


def gradients(adjoint, problem, *, scale=1.0, settings=TIGHT):
    problem, inputs = differentiable(problem)
    value = adjoint.attach(problem, solve(problem, problem.u.detach(), settings))
    weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value.sin() * weight).sum() * scale, inputs)


def error(got, want):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("contraction", [0.9, 1.5])
def test_implicit_equals_a_long_unroll(contraction):
    problem = random_patterns(30, 12, 20, contraction=contraction)
    assert error(gradients(Implicit(), problem), gradients(Unrolled(n_steps=200), problem)) < 1e-6


def test_in_float32():
    problem = random_patterns(30, 12, 20)
    narrow = Patterns(problem.u.float(), problem.patterns.float(), problem.strength.float(), problem.beta)
    settings = replace(TIGHT, rtol=1e-6, energy_rtol=1e-6)
    got = gradients(Implicit(), narrow, settings=settings)
    assert {x.dtype for x in got} == {torch.float32}
    assert error(got, gradients(Unrolled(n_steps=200), problem)) < 1e-5


def test_gradcheck():
    problem = random_patterns(3, 6, 5)

    def equilibrium(u, patterns, strength):
        given = Patterns(u, patterns, strength, problem.beta)
        solution = solve(given, problem.u, replace(TIGHT, mode="simultaneous"))
        return Implicit(rtol=1e-12).attach(given, solution)

    _, inputs = differentiable(problem)
    assert torch.autograd.gradcheck(equilibrium, inputs, eps=1e-5, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1e7, 1e-30])
def test_the_scale_of_the_loss_does_not_matter(scale):
    problem = random_patterns(30, 12, 20)
    scaled = [x / scale for x in gradients(Implicit(rtol=1e-3), problem, scale=scale)]
    assert error(scaled, gradients(Implicit(rtol=1e-3), problem)) < 1e-12


def test_the_bias_of_a_phantom_shrinks_at_the_contraction_rate():
    problem = quadratic(30, 12, largest=0.8)
    exact = torch.linalg.inv(torch.eye(12).double() - problem.a)
    top = torch.linalg.eigh(problem.a).eigenvectors[:, -1]

    def bias(n_steps):
        u = problem.u.clone().requires_grad_()
        given = replace(problem, u=u)
        value = Phantom(n_steps=n_steps).attach(given, solve(given, problem.u, TIGHT))
        (got,) = torch.autograd.grad((value @ top).sum(), u)
        return (got - top @ exact).norm(dim=1)

    for n in (1, 2, 5):
        torch.testing.assert_close(bias(n + 1), 0.8 * bias(n), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias(1), torch.full_like(bias(1), 0.8 / (1 - 0.8)), rtol=1e-9, atol=1e-12)
    assert (bias(60) < 1e-4).all()


def saved_bytes(adjoint, problem, max_steps):
    sizes = []
    settings = SolverConfig(mode="picard", rtol=1e-13, max_steps=max_steps, on_nonconvergence="ignore")

    def pack(x):
        sizes.append(x.numel() * x.element_size())
        return x

    problem, _ = differentiable(problem)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        adjoint.attach(problem, solve(problem, problem.u.detach(), settings))
    return sum(sizes)


def test_memory_does_not_grow_with_the_iterations():
    problem = random_patterns(30, 12, 20)
    few, many = saved_bytes(Implicit(), problem, 4), saved_bytes(Implicit(), problem, 200)
    assert few == many > 0
    assert saved_bytes(Unrolled(n_steps=20), problem, 4) > 5 * few


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(n_steps=2)], ids=["implicit", "phantom"])
def test_the_value_is_the_solvers_with_and_without_gradients(adjoint):
    problem, _ = differentiable(random_patterns(30, 12, 20))
    solution = solve(problem, problem.u.detach(), SolverConfig())
    value = adjoint.attach(problem, solution)
    assert value.requires_grad and torch.equal(value, solution.value)
    with torch.no_grad():
        quiet = adjoint.attach(problem, solution)
    assert not quiet.requires_grad and torch.equal(quiet, solution.value)


def test_only_what_requires_gradients_has_to():
    plain = random_patterns(30, 12, 20)
    u = plain.u.clone().requires_grad_()
    problem = replace(plain, u=u)
    value = Implicit().attach(problem, solve(problem, plain.u, TIGHT))
    (got,) = torch.autograd.grad(value.sum(), u)
    assert got.isfinite().all() and plain.patterns.grad is None
    constant = Implicit().attach(plain, solve(plain, plain.u, TIGHT))
    assert not constant.requires_grad


def test_what_the_backward_pass_did_is_told():
    problem, inputs = differentiable(random_patterns(30, 12, 20))
    solution = solve(problem, problem.u.detach(), TIGHT)
    value = Implicit().attach(problem, solution)
    assert solution.backward is None
    torch.autograd.grad(value[:10].sum(), inputs)
    info = solution.backward
    assert (info.num_steps[:10] > 1).all() and (info.num_steps[10:] == 0).all()
    assert (info.residual <= 1e-6).all() and (info.residual[:10] > 0).all()


def test_an_unsolved_system_raises_warns_or_is_ignored():
    problem = random_patterns(30, 12, 20)
    wanted = r"not solved for 30 of 30 rows: worst relative residual 0\.\d+, wanted 1e-06 within 1 steps"
    with pytest.raises(ConvergenceError, match=wanted):
        gradients(Implicit(max_steps=1), problem)
    with pytest.warns(ConvergenceWarning, match=wanted):
        gradients(Implicit(max_steps=1, on_nonconvergence="warn"), problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients(Implicit(max_steps=1, on_nonconvergence="ignore"), problem)
    assert error(got, gradients(Implicit(), problem)) < 0.3


def test_a_saddle_has_no_gradient():
    basis = torch.diag(torch.tensor([1.5, 0.5, 0.5], dtype=torch.float64))
    u = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    problem = replace(quadratic(1, 3), u=u, a=basis)
    solution = solve(problem, torch.zeros(1, 3).double(), SolverConfig(mode="picard", max_steps=60))
    with pytest.raises(ConvergenceError, match="1 of them at a saddle"):
        Implicit().attach(problem, solution).sum().backward()
    value = Implicit(on_nonconvergence="ignore").attach(problem, solution)
    (got,) = torch.autograd.grad(value[0, 0], u)
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0, 0.0]]).double())


def test_a_second_derivative_is_refused():
    problem, (u, patterns, _) = differentiable(random_patterns(5, 6, 10))
    solution = solve(problem, problem.u.detach(), TIGHT)
    value = Implicit().attach(problem, solution)
    (first,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()
    (first,) = torch.autograd.grad(Implicit().attach(problem, solution).sum(), patterns, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), u)


def test_unrolling_starts_at_the_start_and_ends_where_it_ends():
    problem = random_patterns(5, 6, 10)
    start = torch.randn_like(problem.u)
    solution = solve(problem, start, TIGHT)
    value = Unrolled(n_steps=2).attach(problem, solution)
    assert torch.equal(value, problem.map(problem.map(start)))


def test_unrolling_is_differentiated_back_to_the_start():
    problem = random_patterns(5, 6, 10)
    start = torch.randn_like(problem.u).requires_grad_()
    value = Unrolled(n_steps=2).attach(problem, solve(problem, start, TIGHT))
    (found,) = torch.autograd.grad(value.sin().sum(), start)
    (expected,) = torch.autograd.grad(problem.map(problem.map(start)).sin().sum(), start)
    assert torch.equal(found, expected) and found.norm() > 0.01
    half = start.detach().bfloat16().requires_grad_()  # widened on the way
    problem = Patterns(problem.u.float(), problem.patterns.float(), problem.strength.float(), problem.beta)
    value = Unrolled(n_steps=1).attach(problem, solve(problem, half, SolverConfig(max_steps=100)))
    assert torch.autograd.grad(value.sum(), half)[0].norm() > 0.01


def test_unrolling_the_solvers_own_steps_ends_at_its_value():
    problem, inputs = differentiable(random_patterns(30, 12, 20, contraction=1.5))
    settings = SolverConfig(mode="picard", rtol=1e-3, max_steps=100)
    solution = solve(problem, problem.u.detach(), settings)
    assert len(solution.num_steps.unique()) > 2
    value = Unrolled().attach(problem, solution)
    torch.testing.assert_close(value, solution.value, rtol=1e-12, atol=1e-12)
    one = solution.num_steps.argmin()
    alone = Unrolled(n_steps=int(solution.num_steps[one])).attach(problem, solution)[one]
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), inputs) for x in (value[one], alone)), strict=True):
        torch.testing.assert_close(a, b)
    nothing = solve(problem.take(torch.arange(0)), problem.u[:0], settings)
    assert len(Unrolled().attach(problem.take(torch.arange(0)), nothing)) == 0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("adjoint", [Phantom(n_steps=80), Unrolled(n_steps=80)], ids=["phantom", "unrolled"])
def test_forward_mode_is_right(adjoint):
    plain = random_patterns(5, 6, 10)

    def total(u):
        problem = replace(plain, u=u)
        return adjoint.attach(problem, solve(problem, plain.u, TIGHT)).sin().sum()

    tangent = torch.randn_like(plain.u)
    found = torch.func.jvp(total, (plain.u,), (tangent,))[1]
    torch.testing.assert_close(found, (torch.func.grad(total)(plain.u) * tangent).sum(), rtol=1e-6, atol=0)


def test_autocast_does_not_reach_the_map():
    seen = []

    class Watching(type(quadratic(1, 2))):
        def map(self, z):
            seen.append((z @ self.a).dtype)
            return super().map(z)

        def jvp(self, z, v):
            seen.append((v @ self.a).dtype)
            return super().jvp(z, v)

    plain = quadratic(5, 8, dtype=torch.float32)
    problem: AbstractProblem = Watching(plain.u.clone().requires_grad_(), plain.a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(problem, torch.zeros_like(plain.u), SolverConfig(max_steps=100))
        for adjoint in (Implicit(), Phantom(n_steps=1), Unrolled(n_steps=1)):
            adjoint.attach(problem, solution).sum().backward()
    assert len(seen) > 5 and set(seen) == {torch.float32}
