"""What must hold of equilibria whatever the weights: the properties by which the layer was specified.

``E`` is a token's energy, ``f(z) = z - grad E(z)`` its map, ``J`` the map's Jacobian::

    P1   grad E(z) = z - f(z)                                   p1; tests/ops/test_token_energy.py
    P2   E(f(z)) <= E(z) - |f(z) - z|^2 / 2, any parameters     p2; tests/ops/test_token_energy.py
    P3   J v is f's derivative; J symmetric, not negative       p3; tests/ops/test_token_energy.py
    P4   the certificate bounds |J| everywhere                  p4; tests/ops/test_token_energy.py
    P5   E never rises: alternating, simultaneous               p5; tests/solvers
    P6   all modes end at the same equilibrium (contractive)    p6
    P7   rows are alone: permuted, repeated, dropped            p7; batch: tests/models/test_mamba_hopfield.py
    P8   causality, unconverged and in gradients                tests/models/test_mamba_hopfield.py
         a stream equals the whole pass                         tests/models/test_decoders.py; test_mamba_hopfield.py
    P9   implicit gradient = long unroll; gradcheck; eval mode  tests/layers/test_equilibrium_gradients.py
    P10  memory does not grow with iterations                   tests/layers/test_equilibrium_gradients.py
    P11  warm starts: at z* done at once; shapes refused        p11; tests/layers/test_equilibrium.py
    P12  honest flags; what is not finite is refused            p12; tests/layers/test_equilibrium.py
    P13  the scan                                               tests/ops/test_ssd.py, tests/layers/test_mamba.py
    P14  causal convolution                                     tests/ops/test_causal_conv.py
    P15  memory: writes, evaluation, round trip, names          tests/layers/test_hopfield.py,
                                                                tests/models/test_mamba_hopfield.py
    P16  bfloat16 autocast                                      tests/models/test_mamba_hopfield.py
    T-B  two opposite patterns, start on the ridge              t_b
    T-C  one basin in the contractive regime, two beyond        t_c
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from equilibrium_cases import MODES, MONOTONE, TIGHT, context, jacobians, make_layer, random_problem, run
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.ops.token_energy import contraction_certificate
from helmholtz.solvers import SolverConfig, solve

PROBLEMS = {
    "seed": strategies.integers(0, 10**6),
    "width": strategies.integers(4, 32),
    "patterns": strategies.integers(1, 64),
    "stability": strategies.sampled_from(["contractive", "descent"]),
}


def cases(seed: int, width: int, patterns: int, stability: str) -> Iterator[tuple[TokenProblem, Tensor]]:
    """A layer's problem and points around it; then the problem without one of its terms, and with empty slots."""
    layer = make_layer(seed, d_model=width, n_patterns=patterns, n_slots=3, stability=stability)
    found = run(layer, context(2, 6, width, seed))
    z = found.rows(found.z).detach() + torch.randn(12, width, dtype=torch.float64)
    whole = converted(found.problem, torch.float64)
    yield whole, z
    zero, empty = torch.zeros(1, dtype=torch.float64), torch.full((patterns + 3,), -torch.inf).double()
    for changed in ({"kappa": zero}, {"strength": zero}, {"log_prior": empty}):
        yield replace(whole, parameters=whole.parameters._replace(**changed)), z


def converted(problem: TokenProblem, dtype: torch.dtype) -> TokenProblem:
    """The same energies without their past, in another precision."""
    parts = (problem.field, problem.parameters)
    return TokenProblem(
        *(type(x)(*(y.detach().to(dtype) if isinstance(y, Tensor) else y for y in x)) for x in parts)
    )


@settings(max_examples=15)
@given(**PROBLEMS)
def test_p1_the_residual_is_the_gradient_of_the_energy(**case: object) -> None:
    for problem, z in cases(**case):
        z.requires_grad_()
        (slope,) = torch.autograd.grad(problem.energy(z).sum(), z)
        torch.testing.assert_close(slope, z - problem.map(z), rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(**PROBLEMS)
@torch.no_grad()
def test_p2_a_step_lowers_the_energy_by_half_of_its_square(**case: object) -> None:
    for problem, z in cases(**case):
        for _ in range(5):
            step, before = problem.map_and_energy(z)
            allowed = before - (step - z).square().sum(-1) / 2 + 1e-10 * (1 + before.abs())
            assert (problem.energy(step) <= allowed).all()
            torch.testing.assert_close(problem.energy(z), before)
            z = step


@settings(max_examples=15)
@given(**PROBLEMS)
def test_p3_the_jacobian_is_the_derivative_symmetric_and_not_negative(**case: object) -> None:
    for problem, z in cases(**case):
        v = torch.randn_like(z)
        _, expected = torch.autograd.functional.jvp(problem.map, z, v)
        torch.testing.assert_close(problem.jvp(z, v), expected, rtol=1e-9, atol=1e-11)
        j = jacobians(problem, z)
        torch.testing.assert_close(j, j.mT, rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(j).min() >= -1e-10


@settings(max_examples=8)
@given(seed=PROBLEMS["seed"], patterns=PROBLEMS["patterns"], stability=PROBLEMS["stability"])
@torch.no_grad()
def test_p4_the_certificate_bounds_the_jacobian_everywhere(seed: int, patterns: int, stability: str) -> None:
    layer = make_layer(seed, n_patterns=patterns, stability=stability)
    found = run(layer, context(1, 100, 8, seed))
    m = found.parameters.patterns
    pairs = torch.randint(len(m), (2, 500))
    anywhere = torch.cat([(m[pairs[0]] + m[pairs[1]]) / 2, 3 * torch.randn(400, 8, dtype=torch.float64)])
    points = torch.cat([found.z[0], anywhere])
    sizes = torch.linalg.eigvalsh(jacobians(found.problem.take(torch.arange(1000) % 100), points))[:, -1]
    certificate = contraction_certificate(found.field, found.parameters)
    assert sizes.max() <= certificate * (1 + 1e-12)
    assert found.certificate() == certificate
    if stability == "contractive":
        assert certificate < 0.9


@pytest.mark.parametrize("mode", MONOTONE)
@pytest.mark.parametrize("stability", ["contractive", "descent"])
@torch.no_grad()
def test_p5_the_energy_never_rises(mode: str, stability: str) -> None:
    steps = 0
    for seed in range(5):
        layer = make_layer(seed, stability=stability, n_patterns=20)
        problem = run(layer, context(2, 64, 8, seed)).problem
        for scale in (0.1, 1.0, 10.0):
            z = scale * torch.randn(128, 8, dtype=torch.float64)
            energies = solve(problem, z, replace(TIGHT, mode=mode, on_nonconvergence="ignore"), record=True)
            e = torch.stack(energies.energies)
            assert (e.diff(dim=0) <= 1e-12 * (1 + e[:-1].abs())).all()
            torch.testing.assert_close(e[0], problem.energy(z))
            torch.testing.assert_close(e[-1], problem.energy(energies.value))
            steps += int(energies.num_steps.sum())
    assert steps > 5000


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@torch.no_grad()
def test_p6_all_modes_end_at_the_one_equilibrium(rtol: float) -> None:
    layer = make_layer(3, n_patterns=20)
    found = run(layer, context(2, 64, 8))
    slack = 10 * rtol / (1 - found.certificate())
    for mode in MODES:
        layer.solver = SolverConfig(mode=mode, max_steps=200, rtol=rtol, energy_rtol=rtol)
        other = run(layer, context(2, 64, 8))
        assert other.converged.all()
        distance = (other.z - found.z).norm(dim=-1)
        assert (distance <= slack * found.z.norm(dim=-1)).all()
        assert distance.max() > 0


def in_other_company(problem: TokenProblem, start: Tensor, config: SolverConfig) -> Iterator[tuple]:
    """Indices of rows; their solution among all, reversed, repeated and among other neighbours; that of all."""
    whole = solve(problem, start, config)
    for rows in (
        torch.arange(149, -1, -1), torch.arange(10).repeat(17), torch.arange(0, 150, 7), torch.tensor([41])
    ):  # fmt: skip
        yield rows, solve(problem.take(rows), start[rows], config), whole


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_steps", [1, 3, 10])
@torch.no_grad()
def test_p7_a_row_is_solved_as_if_it_were_alone(mode: str, max_steps: int) -> None:
    """But for rounding, in whatever regime."""
    layer = make_layer(3, stability="descent", d_inner=16, n_patterns=24)
    problem = converted(run(layer, context(2, 75, 8)).problem, torch.float64)
    start = torch.randn(150, 8, dtype=torch.float64)
    config = SolverConfig(mode=mode, max_steps=max_steps, rtol=1e-5, on_nonconvergence="ignore")
    for rows, part, whole in in_other_company(problem, start, config):
        for name in ("value", "status", "num_steps", "residual", "energy"):
            expected = getattr(whole, name)[rows]
            torch.testing.assert_close(getattr(part, name), expected, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_p7_answers_in_other_company_are_as_near_as_their_residuals_say(
    mode: str, dtype: torch.dtype
) -> None:
    layer = make_layer(3, n_patterns=24)
    found = run(layer, context(2, 75, 8))
    problem, rtol = converted(found.problem, dtype), 1e-5 if dtype == torch.float32 else 1e-12
    config = SolverConfig(mode=mode, max_steps=200, rtol=rtol, energy_rtol=rtol)
    for rows, part, whole in in_other_company(problem, torch.randn(150, 8).to(dtype), config):
        distance = (part.value - whole.value[rows]).norm(dim=-1)
        # f and z differ by the residual: twice rtol |f| covers that and the rounding of both
        assert (distance <= 4 * rtol / (1 - found.certificate()) * whole.value[rows].norm(dim=-1)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stability", ["contractive", "descent"])
@torch.no_grad()
def test_p11_from_the_equilibrium_it_takes_no_more_than_two_steps(mode: str, stability: str) -> None:
    layer, c = make_layer(4, stability=stability), context(2, 10, 8)
    found = run(layer, c)
    for rtol in (1e-3, 1e-8):
        layer.solver = SolverConfig(mode=mode, rtol=rtol, energy_rtol=rtol, on_nonconvergence="ignore")
        cold, warm = run(layer, c), run(layer, c, z_init=found.z)
        assert warm.converged.all() and warm.num_steps.max() <= 2
        assert cold.num_steps.max() > warm.num_steps.max()
        torch.testing.assert_close(warm.z, found.z, rtol=rtol, atol=rtol)
        assert torch.equal(warm.z_init, found.z)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_p12_what_has_not_converged_says_so(mode: str) -> None:
    layer, c = make_layer(5), context(2, 20, 8)
    layer.solver = SolverConfig(mode=mode, max_steps=1, rtol=1e-6, on_nonconvergence="ignore")
    found = run(layer, c)
    rows = found.rows(found.z)
    step = found.problem.map(rows)
    residual = ((step - rows).norm(dim=-1) / (step.norm(dim=-1) + 1e-9)).view(2, 20)
    assert not found.converged.any() and (found.residual > 1e-6).all()
    assert (residual > 1e-6).all() and (found.num_steps == 1).all()
    layer.solver = replace(layer.solver, max_steps=100)
    found = run(layer, c)
    rows = found.rows(found.z)
    step = found.problem.map(rows)
    assert found.converged.all() and (found.residual <= 1e-6).all()
    assert ((step - rows).norm(dim=-1) <= 1.01e-6 * step.norm(dim=-1)).all()


def two_patterns(*, rows: int, strength: float, u: float) -> TokenProblem:
    """Patterns ``+-R e_0`` and a pull ``u`` across them: the ridge between two attractors, if there are two."""
    problem = random_problem(0, rows=rows, width=16, channels=4, patterns=2)
    direction = torch.zeros(1, 16, dtype=torch.float64)
    direction[0, 0] = 2.0  # 16^(1/4)
    pull = torch.zeros(rows, 16, dtype=torch.float64)
    pull[:, 1] = u
    parameters = problem.parameters._replace(
        patterns=torch.cat([direction, -direction]),
        kappa=torch.zeros(1, dtype=torch.float64),
        strength=torch.full((1,), strength, dtype=torch.float64),
    )
    return TokenProblem(problem.field._replace(u=pull), parameters)


@torch.no_grad()
def test_t_b_mixing_beats_plain_steps_where_the_map_hardly_contracts() -> None:
    """Two opposite patterns reach the certificate's 0.9 on the ridge; starts beside it have to come back to it."""
    problem = two_patterns(rows=200, strength=0.9 / (2 * 4), u=1.0)
    start = problem.field.u + 0.1 * torch.randn(200, 16, dtype=torch.float64)
    top = jacobians(problem.take(torch.tensor([0])), torch.zeros(1, 16, dtype=torch.float64))
    assert torch.linalg.eigvalsh(top).max() == pytest.approx(0.9)
    steps = {}
    for mode in ("picard", "alternating"):
        found = solve(problem, start, SolverConfig(mode=mode, max_steps=200, rtol=1e-6, energy_rtol=1e-6))
        assert found.converged.all() and found.value[:, 0].abs().max() < 1e-4
        steps[mode] = found.num_steps.double().mean().item()
    assert steps["alternating"] <= 10 and steps["picard"] >= 40


@pytest.mark.parametrize("mode", MONOTONE)
@torch.no_grad()
def test_t_c_one_basin_where_the_map_contracts_two_where_it_does_not(mode: str) -> None:
    axis = torch.linspace(-3, 3, 20, dtype=torch.float64)  # even: no start on the ridge
    start = torch.zeros(400, 16, dtype=torch.float64)
    start[:, 0], start[:, 1] = axis.repeat(20), axis.repeat_interleave(20)
    config = SolverConfig(mode=mode, max_steps=300, rtol=1e-9, energy_rtol=1e-9)
    one = solve(two_patterns(rows=400, strength=0.9 / (2 * 4), u=1.0), start, config)
    assert one.converged.all()
    torch.testing.assert_close(one.value, one.value[:1].expand(400, -1), rtol=0, atol=1e-6)
    two = solve(two_patterns(rows=400, strength=1.0, u=0.0), start, config)
    assert two.converged.all()
    assert torch.equal(two.value[:, 0].sign(), start[:, 0].sign()), "the border is the bisector"
    for sign in (-1, 1):
        ends = two.value[start[:, 0].sign() == sign]
        torch.testing.assert_close(ends, ends[:1].expand(200, -1), rtol=0, atol=1e-6)
        assert (ends[:, 0] * sign > 1.9).all()
