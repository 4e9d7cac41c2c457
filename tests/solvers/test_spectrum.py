"""The largest eigenvalue of a map's Jacobian, against dense ones."""

import pytest
import torch

from equilibrium_cases import jacobians, random_problem
from helmholtz.solvers.spectrum import local_lipschitz, top_eigenvector


def case(seed=0, rows=7, width=6):
    problem = random_problem(seed, rows=rows, width=width, channels=9, patterns=5)
    z = torch.randn(rows, width, dtype=torch.float64)
    return problem, z, torch.linalg.eigvalsh(jacobians(problem, z))[:, -1]


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("seed", range(3))
def test_it_comes_close_from_below(seed):
    problem, z, exact = case(seed)
    found = [local_lipschitz(problem, z, steps=n, generator=generator()) for n in (0, 1, 4, 16, 300)]
    for less, more in zip(found, found[1:], strict=False):
        assert (less <= more + 1e-12).all()
    assert (found[-1] <= exact + 1e-12).all()
    torch.testing.assert_close(found[-1], exact, rtol=1e-3, atol=0)
    assert (found[1] < 0.98 * exact).any()


def test_a_map_without_slope_has_constant_0_and_a_unit_vector_all_the_same():
    problem, z, _ = case()
    still = problem.__class__(
        problem.field._replace(gate=torch.zeros_like(problem.field.gate)),
        problem.parameters._replace(strength=torch.zeros(1, dtype=torch.float64)),
    )
    v = top_eigenvector(still, z, steps=3, generator=generator())
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(7, dtype=torch.float64))
    assert (local_lipschitz(still, z, steps=3, generator=generator()) == 0).all()


def test_its_gradient_is_that_of_the_eigenvalue():
    problem, z, _ = case()
    kappa = problem.parameters.kappa.clone().requires_grad_()
    moved = problem.__class__(problem.field, problem.parameters._replace(kappa=kappa))
    found = local_lipschitz(moved, z, steps=500, generator=generator())
    (actual,) = torch.autograd.grad(found.sum(), kappa)
    (wanted,) = torch.autograd.grad(torch.linalg.eigvalsh(jacobians(moved, z))[:, -1].sum(), kappa)
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_neighbours_matter_by_rounding_alone(rows):
    problem, z, _ = case(rows=rows)
    together = top_eigenvector(problem, z, steps=5, generator=generator())
    constants = local_lipschitz(problem, z, steps=5, generator=generator())
    for chosen in ([rows - 1], list(range(rows))[::-3]):
        some = problem.take(torch.tensor(chosen))
        alone = top_eigenvector(some, z[chosen], steps=5, generator=generator())
        torch.testing.assert_close(alone, together[chosen], rtol=0, atol=1e-12)
        constant = local_lipschitz(some, z[chosen], steps=5, generator=generator())
        torch.testing.assert_close(constant, constants[chosen], rtol=1e-12, atol=0)


def test_bad_steps_are_named():
    problem, z, _ = case()
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        top_eigenvector(problem, z, steps=-1, generator=generator())
