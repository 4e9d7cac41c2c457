"""A model as it is built keeps every promise; one that is broken in one place fails where it says so."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import helmholtz.evals.convergence_model
import helmholtz.layers.equilibrium
import helmholtz.solvers.loop
from equilibrium_cases import make_model
from helmholtz.evals.convergence import ConvergenceValidator
from helmholtz.evals.convergence_case import Check, validation_case
from helmholtz.evals.convergence_model import check_causality
from helmholtz.layers.dynamics import TokenDynamics
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.ops.token_energy import TokenJacobian
from helmholtz.solvers import Implicit, SolverConfig, solve
from other_rounding import OtherRounding


def fresh(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_state": 8, "d_head": 8, "n_layers": 1, "n_patterns": 24}
    return MambaHopfield(MambaHopfieldConfig(**sizes | fields))


def validate(model, **fields):
    return ConvergenceValidator(model, **{"batch": 2, "time": 6} | fields).run_all_tests()


def test_a_new_model_of_the_readmes_shape_passes():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_state": 64, "d_head": 32, "n_layers": 6, "n_patterns": 256}
    model = MambaHopfield(MambaHopfieldConfig(vocab_size=256, **sizes))
    report = ConvergenceValidator(model).run_all_tests()
    assert report.all_passed, report.failed
    assert report.contraction.is_contractive and report.energy_descent.monotonic_descent
    assert report.stability.is_stable and report.stability.tested_equilibria == 32
    assert report.uniqueness.is_unique and report.lyapunov.is_lyapunov
    # power iteration at midpoints sees what random pairs do not
    assert report.contraction.max_lipschitz > 3 * report.contraction.max_pair_ratio
    assert report.gradient.without_gradient == ("equilibrium.dynamics.start_proj.weight",)


@pytest.mark.parametrize(
    ("stability", "mode"),
    [
        ("contractive", "simultaneous"),
        ("contractive", "cascade"),
        ("descent", "alternating"),
        ("descent", "simultaneous"),  # "cascade" may come to rest on a saddle there, and is told so
    ],
)
def test_both_regimes_and_all_modes_pass(stability, mode):
    report = validate(fresh(stability=stability, solver=SolverConfig(mode=mode)), seed=1)
    assert report.all_passed, report.failed
    if stability == "descent":
        assert report.uniqueness.mean_attractors > 1.5
        assert report.contraction.certificate > 1 > 1 - report.contraction.stable_fraction


@pytest.mark.parametrize("stability", ["contractive", "descent"])
def test_a_good_model_passes_where_a_product_rounds_a_row_by_its_place(stability, monkeypatch):
    monkeypatch.setattr(helmholtz.evals.convergence_model, "SOLVER_MODES", ("alternating",))
    monkeypatch.setattr(helmholtz.evals.convergence_model, "STEP_LIMITS", (3,))
    model = fresh(stability=stability).eval()
    case = validation_case(model, torch.arange(10).view(2, 5), seed=1)
    with OtherRounding():
        found = check_causality(case)
    assert found.passed, found
    assert 0 < found.row_values < 1e-8 and found.future_gradients == 0


def test_a_contraction_near_its_limit_passes():
    report = validate(make_model(max_seq_len=64))
    assert report.all_passed, report.failed
    assert report.contraction.construction > 0.85
    assert report.gradient.worst_error > 0


def test_given_tokens_are_the_ones_that_are_tested():
    model = fresh()
    tokens = torch.arange(12).view(2, 6)
    validator = ConvergenceValidator(model, tokens)
    assert validator.run_all_tests().stability.tested_equilibria == 12
    for wrong in (torch.arange(5), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"tokens must be of shape \(B, T\) with T at least 2"):
            ConvergenceValidator(model, wrong)
    with pytest.raises(ValueError, match="time must be at most max_seq_len=1024, got 2000"):
        ConvergenceValidator(model, time=2000)


def test_results_are_plain_values_and_follow_the_seed():
    model = fresh()
    first, again = (validate(model, batch=1, time=2).to_dict() for _ in range(2))
    assert first == again
    other = ConvergenceValidator(model, batch=1, time=2, seed=1)
    assert not torch.equal(other.tokens, ConvergenceValidator(model, batch=1, time=2).tokens)
    assert first["all_passed"] is True
    assert first["contraction"]["checks"][0].keys() == {"what", "measured", "comparison", "limit", "passed"}
    assert first["energy_descent"]["violation_rate"] == 0
    words = {"contraction": "is_contractive", "energy_descent": "monotonic_descent", "stability": "is_stable",
             "uniqueness": "is_unique", "lyapunov": "is_lyapunov"}  # fmt: skip
    assert all(first[test][word] is True for test, word in words.items())
    assert first["lyapunov"]["lyapunov_rate"] == first["stability"]["stability_rate"] == 1


def test_the_model_is_left_as_it_was():
    model = fresh(n_slots=4, solver=SolverConfig(mode="cascade"), adjoint="phantom")
    model.train()
    model.blocks[0].eval()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    solver, adjoint, modes = model.solver, model.equilibrium.adjoint, [m.training for m in model.modules()]
    assert validate(model).all_passed
    assert model.solver is solver and model.equilibrium.adjoint is adjoint
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["embed.weight"]
    assert torch.equal(model.embed.weight.grad, torch.ones_like(model.embed.weight))


def test_a_model_that_raises_where_it_does_not_converge_is_measured_all_the_same():
    model = fresh(solver=SolverConfig(max_steps=1, rtol=1e-6, on_nonconvergence="raise"))
    report = validate(model)
    assert report.failed == ("stability",)
    assert report.stability.tested_equilibria == 0
    assert math.isnan(report.stability.worst_return)


def test_nan_is_on_no_side_of_a_limit():
    assert not any(Check("", math.nan, sign, 0).passed for sign in ("<", "<=", ">", ">="))


# ---- one thing broken, and the test that has to say so


def test_a_memory_three_times_too_strong_is_no_certified_contraction(monkeypatch):
    original = TokenDynamics.energy_parameters

    def stronger(self, *held):
        parameters = original(self, *held)
        return parameters._replace(strength=3 * parameters.strength)

    monkeypatch.setattr(TokenDynamics, "energy_parameters", stronger)
    report = validate(fresh())
    assert report.failed == ("contraction",)
    assert report.contraction.construction == pytest.approx(1.2, abs=0.01)


def with_map(monkeypatch, change):
    """Every map ``f`` becomes ``change(problem, z, f)``; energies stay."""
    mapped, both = TokenProblem.map, TokenProblem.map_and_energy

    def new_both(self, z):
        f, energy = both(self, z)
        return change(self, z, f), energy

    monkeypatch.setattr(TokenProblem, "map", lambda self, z: change(self, z, mapped(self, z)))
    monkeypatch.setattr(TokenProblem, "map_and_energy", new_both)


def test_a_residual_map_that_descends_no_energy_is_found(monkeypatch):
    with_map(monkeypatch, lambda problem, z, f: z + 0.1 * f)
    report = validate(fresh(), batch=1, time=3)
    assert {"energy_descent", "residual_energy"} <= set(report.failed)
    assert report.energy_descent.violation_rate > 0.5
    assert report.residual_energy.gradient_error_double > 1e-3


def test_a_map_with_the_right_equilibria_but_another_gradient_is_found(monkeypatch):
    """Damping keeps equilibria, descent and contraction; only the residual is not the gradient any more."""
    with_map(monkeypatch, lambda problem, z, f: 0.01 * z + 0.99 * f)
    product = TokenJacobian.product
    monkeypatch.setattr(TokenJacobian, "product", lambda self, v: 0.01 * v + 0.99 * product(self, v))
    report = validate(fresh())
    assert report.failed == ("residual_energy",)
    failed = [check.what for check in report.residual_energy.checks() if not check.passed]
    assert failed == ["residual against gradient", "the same, float64"]


def test_a_wrong_jacobian_product_is_found(monkeypatch):
    product = TokenJacobian.product
    monkeypatch.setattr(TokenJacobian, "product", lambda self, v: 0.99 * product(self, v))
    report = validate(fresh())
    assert set(report.failed) == {"residual_energy", "gradient"}


def test_a_wrong_energy_is_found(monkeypatch):
    both = TokenProblem.map_and_energy

    def tilted(self, z):
        f, energy = both(self, z)
        return f, energy + 0.1 * z[:, 0]

    monkeypatch.setattr(TokenProblem, "map_and_energy", tilted)
    report = validate(fresh())
    assert {"energy_descent", "lyapunov", "residual_energy"} <= set(report.failed)
    assert "contraction" not in report.failed and "gradient" not in report.failed
    assert report.lyapunov.decreasing_rate < 1


def test_an_energy_four_times_too_large_is_not_bounded_by_the_residual(monkeypatch):
    both, energy = TokenProblem.map_and_energy, TokenProblem.energy

    def larger(self, z):
        f, value = both(self, z)
        return f, 4 * value

    monkeypatch.setattr(TokenProblem, "map_and_energy", larger)
    monkeypatch.setattr(TokenProblem, "energy", lambda self, z: 4 * energy(self, z))
    report = validate(fresh(), batch=1)
    assert report.failed == ("lyapunov", "residual_energy")
    assert report.lyapunov.bound_rate == 0 and report.lyapunov.decreasing_rate == 1


def test_a_solver_that_goes_uphill_is_found(monkeypatch):
    monkeypatch.setattr(
        helmholtz.solvers.loop, "decreases", lambda old, new: torch.ones_like(old.energy, dtype=torch.bool)
    )
    report = validate(fresh(stability="descent"))
    assert report.failed == ("energy_descent",)
    assert report.energy_descent.violation_rate == 0
    assert report.energy_descent.mode_violations["alternating"] > 0


def test_dynamics_that_hear_the_future_are_found(monkeypatch):
    original = TokenDynamics.forward

    def leaking(self, c, *rest):
        return original(self, c + 1e-3 * c.mean(1, keepdim=True), *rest)

    monkeypatch.setattr(TokenDynamics, "forward", leaking)
    report = validate(fresh())
    assert report.failed == ("causality",)
    failed = {check.what for check in report.causality.checks() if not check.passed}
    assert failed == {"values before a change", "gradients from the future"}


def test_a_gradient_of_one_step_is_found(monkeypatch):
    monkeypatch.setattr(Implicit, "attach", lambda self, problem, solution: problem.map(solution.value))
    report = validate(fresh())
    assert report.failed == ("gradient",)
    assert report.gradient.worst_error > 1e-3


def test_an_equilibrium_without_gradient_is_found(monkeypatch):
    monkeypatch.setattr(Implicit, "attach", lambda self, problem, solution: solution.value)
    report = validate(fresh())
    assert report.failed == ("gradient",)
    assert report.gradient.worst_error > 0.1


def test_a_solver_that_stops_all_rows_together_is_found(monkeypatch):
    """As long as one row goes on, all do: the common habit of flattening the sequence."""

    def together(problem, z0, config, *, record=False):
        solution = solve(problem, z0, config, record=record)
        last = int(solution.num_steps.max())
        for _ in range(last - int(solution.num_steps.min())):
            solution.value = problem.map(solution.value)
        solution.num_steps = torch.full_like(solution.num_steps, last)
        return solution

    for module in (helmholtz.layers.equilibrium, helmholtz.evals.convergence_model):
        monkeypatch.setattr(module, "solve", together)
    report = validate(fresh(solver=SolverConfig(rtol=1e-4)))
    assert report.failed == ("causality",)
    failed = {check.what for check in report.causality.checks() if not check.passed}
    assert "rows solved without others" in failed


def test_an_answer_that_remembers_its_start_is_not_unique(monkeypatch):
    def sluggish(problem, z0, config, *, record=False):
        solution = solve(problem, z0, config, record=record)
        solution.value = 0.99 * solution.value + 0.01 * z0
        return solution

    monkeypatch.setattr(helmholtz.layers.equilibrium, "solve", sluggish)
    report = validate(fresh())
    assert report.failed == ("uniqueness", "gradient")  # which is taken where no equilibrium is
    failed = [check.what for check in report.uniqueness.checks() if not check.passed]
    assert failed == ["distance, z_init"]


def at_the_edge(model, monkeypatch):
    """Two opposite patterns, and an input that nearly tips the token from one to the other.

    Along the patterns f(z) = u + R tanh(beta R z), whose upper equilibrium and saddle meet at the fold, where the slope
    is 1; just before it they are 2 sqrt(2 gap / |f''|) apart.
    """
    width, beta = model.config.d_model, model.config.beta
    radius = width**0.25
    gain = beta * radius
    fold = math.atanh(math.sqrt(1 - 1 / (gain * radius))) / gain
    tip = fold - radius * math.tanh(gain * fold)
    curvature = 2 * gain * math.tanh(gain * fold)
    gap, direction = 0.003, torch.nn.functional.normalize(torch.randn(width), dim=0)
    with torch.no_grad():
        model.memory_patterns.copy_(torch.stack([direction, -direction]))
        model.equilibrium.dynamics.log_strengths.copy_(torch.tensor([-20.0, 0.0]))
    original = TokenDynamics.forward

    def forward(self, *given):
        found = original(self, *given)
        u = torch.zeros_like(found.field.u) + (tip + gap) * direction.to(found.field.u)
        start = torch.zeros_like(found.start) + radius * direction.to(found.start)
        return replace(found, field=found.field._replace(u=u), start=start)

    monkeypatch.setattr(TokenDynamics, "forward", forward)
    return 2 * math.sqrt(2 * gap / curvature) / radius


def test_an_equilibrium_that_a_push_tips_over_is_not_stable(monkeypatch):
    model = fresh(stability="descent", n_patterns=2)
    distance = at_the_edge(model, monkeypatch)
    assert 0.005 < distance < 0.05  # from the equilibrium to the saddle, in norms of the patterns
    report = validate(model)
    assert report.failed == ("stability",)
    # one of three directions tips it; of 18 pushes one in another direction may
    assert 2 / 3 - 1.01 / 18 <= report.stability.stability_rate <= 2 / 3
    assert report.contraction.stable_fraction == 1


def test_tokens_at_rest_on_a_saddle_are_found(monkeypatch):
    model = fresh(stability="descent", n_patterns=2)
    at_the_edge(model, monkeypatch)
    edge = TokenDynamics.forward

    def on_the_ridge(self, *given):
        found = edge(self, *given)
        return replace(found, field=found.field._replace(u=0 * found.field.u), start=0 * found.start)

    monkeypatch.setattr(TokenDynamics, "forward", on_the_ridge)
    report = validate(model)
    assert {"contraction", "stability", "gradient"} <= set(report.failed)
    assert report.contraction.stable_fraction == 0
    assert report.stability.stability_rate < 0.5
    assert report.gradient.worst_error == math.inf
