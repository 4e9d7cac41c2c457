"""Every mode finds equilibria, says honestly what it found, and descends where it promises to."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from helmholtz.solvers import ConvergenceError, ConvergenceWarning, SolverConfig, Status, solve
from solver_cases import Patterns, Quadratic, antipodal, quadratic, random_patterns

MODES = ["alternating", "simultaneous", "cascade", "picard", "anderson"]
GUARDED = ["alternating", "simultaneous"]
SEVERAL = 14.4
"""Contraction bound at which random patterns have an equilibrium near each of them."""


def config(mode, *, rtol=1e-6, **others):
    others = {"max_steps": 200, "on_nonconvergence": "raise"} | others
    return SolverConfig(mode=mode, rtol=rtol, energy_rtol=rtol, **others)


def relative_residual(problem, z):
    f = problem.map(z)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-9)


def rises(solution):
    """Steps of rows that raised the energy by more than rounding."""
    energy = torch.stack(solution.energies)
    allowed = (1e-5 if energy.dtype == torch.float32 else 1e-10) * (1 + energy[:-1].abs())
    return int((energy.diff(dim=0) > allowed).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_equilibria_of_a_quadratic(mode, dtype):
    problem = quadratic(70, 12, dtype=dtype)
    solution = solve(problem, torch.zeros_like(problem.u), config(mode, rtol=2e-6))
    exact = torch.linalg.solve(torch.eye(12).double() - problem.a.double(), problem.u.double(), left=False)
    assert solution.value.dtype == dtype
    error = (solution.value.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 2e-6 / (1 - 0.8) * 2
    assert solution.converged.all()


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_where_the_map_contracts(mode):
    problem = random_patterns(100, 16, 40)
    start = torch.randn_like(problem.u)
    found = solve(problem, start, config(mode))
    best = solve(problem, problem.u, config("picard", rtol=1e-13, max_steps=400))
    distance = (found.value - best.value).norm(dim=1)
    assert (distance <= 1e-6 * problem.map(found.value).norm(dim=1) / (1 - 0.9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [*GUARDED, "picard"])
@pytest.mark.parametrize("seed", range(3))
def test_the_energy_never_rises(mode, dtype, seed):
    torch.manual_seed(seed)
    problem = random_patterns(150, 24, 96, contraction=SEVERAL, dtype=dtype)
    found = solve(problem, torch.randn_like(problem.u) * 3, config(mode), record=True)
    assert len(found.energies) > 5
    assert rises(found) == 0


def test_unguarded_mixing_does_raise_it():
    problem = random_patterns(150, 24, 96, contraction=SEVERAL)
    start = torch.randn_like(problem.u) * 3
    found = solve(problem, start, config("anderson", max_steps=500, on_nonconvergence="ignore"), record=True)
    assert rises(found) > 100


@pytest.mark.parametrize("damping", [0.3, 1.7])
@pytest.mark.parametrize("mode", ["alternating", "picard"])
def test_a_damped_step_descends_and_ends_at_the_same_place(mode, damping):
    problem = random_patterns(70, 16, 40)
    damped = solve(problem, problem.u, config(mode, rtol=1e-9, damping=damping), record=True)
    plain = solve(problem, problem.u, config(mode, rtol=1e-9), record=True)
    assert rises(damped) == 0
    assert not torch.equal(damped.iterates[2], plain.iterates[2])
    torch.testing.assert_close(damped.value, plain.value, rtol=1e-7, atol=1e-7)


def test_a_cascade_ends_below_its_start_and_its_second_phase_descends():
    problem = random_patterns(150, 24, 96, contraction=SEVERAL)
    start = torch.randn_like(problem.u) * 3
    found = solve(problem, start, config("cascade", max_steps=20, on_nonconvergence="ignore"), record=True)
    energy = torch.stack(found.energies)
    assert (found.energy <= energy[0]).all()
    allowed = 1e-10 * (1 + energy[11:-1].abs())
    assert (energy[11:].diff(dim=0) <= allowed).all()
    assert (energy[:11].diff(dim=0) > 1e-3).any()


def test_a_cascade_that_went_uphill_starts_again():
    problem, start = antipodal(100, 64, contraction=1.8)
    start = problem.u + 0.05 * (start - problem.u)
    mixed = solve(problem, start, config("anderson"))
    found = solve(problem, start, config("cascade"), record=True)
    uphill = mixed.energy > found.energies[0]
    assert uphill.sum() > 20  # on the ridge, which is a saddle here
    assert (found.energy <= found.energies[0]).all()
    assert (found.energy[uphill] < mixed.energy[uphill] - 0.01).all()
    assert ((found.value - problem.u).norm(dim=1)[uphill] > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_between_opposite_patterns_the_map_crawls_and_the_modes_do_not(dtype):
    problem, start = antipodal(100, 64, dtype=dtype)
    near = problem.u + 0.02 * (start - problem.u)
    plain = solve(problem, near, config("picard"))
    assert plain.num_steps.min() >= 40
    for mode, most in [("alternating", 10), ("simultaneous", 8), ("cascade", 10), ("anderson", 10)]:
        found = solve(problem, near, config(mode))
        assert found.num_steps.max() <= most, mode
    assert solve(problem, start, config("alternating")).num_steps.max() <= 13


@pytest.mark.parametrize("mode", MODES)
def test_a_start_at_the_equilibrium_takes_one_step(mode):
    problem = random_patterns(70, 16, 40)
    found = solve(problem, problem.u, config(mode, rtol=1e-9)).value
    again = solve(problem, found, config(mode))
    assert (again.num_steps <= (2 if mode == "cascade" else 1)).all()
    torch.testing.assert_close(again.value, found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_the_status_is_honest(mode, max_steps):
    problem = random_patterns(100, 16, 40, contraction=3.0)
    start = torch.randn_like(problem.u) * 2
    found = solve(problem, start, config(mode, max_steps=max_steps, on_nonconvergence="ignore"), record=True)
    residual = relative_residual(problem, found.value)
    torch.testing.assert_close(found.residual, residual, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.energy, problem.map_and_energy(found.value)[1])
    meets = (found.residual <= 1e-6) & (found.energy_change <= 1e-6 * (1 + found.energy.abs()))
    assert torch.equal(found.converged, meets)
    assert (found.num_steps[~found.converged] == max_steps).all()
    if max_steps == 1:
        assert (found.status == Status.MAX_STEPS).all()


@pytest.mark.parametrize("mode", ["alternating", "simultaneous", "picard", "anderson"])
def test_an_unconverged_row_is_given_where_its_residual_was_smallest(mode):
    problem = random_patterns(100, 24, 96, contraction=SEVERAL)
    start = torch.randn_like(problem.u) * 3
    settings = config(mode, rtol=1e-12, max_steps=6, on_nonconvergence="ignore")
    found = solve(problem, start, settings, record=True)
    residuals = torch.stack([relative_residual(problem, z) for z in found.iterates])
    left = ~found.converged
    assert left.sum() > 20
    torch.testing.assert_close(found.residual[left], residuals.amin(0)[left], rtol=1e-9, atol=1e-12)
    best = torch.stack(found.iterates)[residuals.argmin(0), torch.arange(100)]
    torch.testing.assert_close(found.value[left], best[left], rtol=1e-12, atol=1e-12)
    if mode == "anderson":
        assert (residuals.argmin(0)[left] < 6).any()


def test_both_tolerances_count():
    problem = quadratic(70, 12)
    start = torch.zeros_like(problem.u)
    tight, loose = {"energy_rtol": 1e-12}, {"energy_rtol": 1e3}
    steps = [
        solve(problem, start, SolverConfig(mode="picard", max_steps=300, rtol=1e-3, **more)).num_steps
        for more in (loose, tight)
    ]
    assert (steps[1] > steps[0]).all()
    residual = solve(problem, start, SolverConfig(mode="picard", max_steps=300, rtol=1e-9, **loose)).num_steps
    assert (residual > steps[0]).all()


@pytest.mark.parametrize("mode", MODES)
def test_recording_keeps_the_real_iterates_and_changes_nothing(mode):
    problem = random_patterns(100, 16, 40)
    start = torch.randn_like(problem.u)
    plain, found = solve(problem, start, config(mode)), solve(problem, start, config(mode), record=True)
    assert plain.iterates is None and plain.energies is None
    assert torch.equal(plain.value, found.value) and torch.equal(plain.num_steps, found.num_steps)
    assert torch.equal(found.iterates[0], start) and torch.equal(found.iterates[-1], found.value)
    for z, energy, mean, residual in zip(
        found.iterates, found.energies, found.energy_history, found.residual_history, strict=True
    ):
        torch.testing.assert_close(energy, problem.map_and_energy(z)[1])
        assert mean == pytest.approx(energy.mean().item())
        assert residual == pytest.approx(relative_residual(problem, z).mean().item())
    if mode != "cascade":
        early = found.num_steps.argmin()
        after = [z[early] for z in found.iterates[found.num_steps[early] :]]
        assert len(after) > 1 and all(torch.equal(z, after[0]) for z in after)


@dataclass(frozen=True)
class Counting(Patterns):
    calls: list = None

    def map_and_energy(self, z):
        self.calls.append("map")
        return super().map_and_energy(z)

    def jvp(self, z, v):
        self.calls.append("jvp")
        return super().jvp(z, v)


@pytest.mark.parametrize("contraction", [0.9, SEVERAL])
@pytest.mark.parametrize("mode", MODES)
def test_evaluations_are_counted(mode, contraction):
    full = random_patterns(30, 24, 96, contraction=contraction)
    start = torch.randn_like(full.u) * 3
    quiet = config(mode, max_steps=15, on_nonconvergence="ignore")
    together = solve(full, start, quiet)
    refused = 0
    for row in range(30):
        calls = []
        problem = Counting(full.u[row : row + 1], full.patterns, full.strength, full.beta, calls)
        found = solve(problem, start[row : row + 1], quiet)
        assert found.num_evaluations.item() == calls.count("map") == together.num_evaluations[row]
        assert found.num_products.item() == calls.count("jvp") == together.num_products[row]
        refused += calls.count("map") - 1 - found.num_steps.item()
    assert (refused > 0) == (mode == "cascade" or (mode in GUARDED and contraction == SEVERAL))


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_arrival_on_a_saddle_is_flagged(mode):
    a = torch.diag(torch.tensor([1.5, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5], dtype=torch.float64))
    u = torch.ones(3, 7, dtype=torch.float64)
    u[:, 0] = 0
    u[2] = torch.tensor([0, 1, 0, 0, 0, 0, 0])
    start = torch.zeros_like(u)
    found = solve(Quadratic(u, a), start, config(mode, anderson_window=2, newton_cg_steps=1))
    assert torch.equal(found.unstable, found.num_steps > 10)
    assert found.unstable.any()
    stable = solve(Quadratic(u, a * 0.6), start, config("picard"))
    assert not stable.unstable.any() and (stable.num_steps > 10).any()


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode):
    problem = random_patterns(0, 16, 40)
    found = solve(problem, problem.u, config(mode))
    assert found.value.shape == (0, 16) and found.converged.shape == (0,) and found.energy_history == []


@pytest.mark.parametrize("mode", MODES)
def test_narrow_input_is_solved_in_float32_also_under_autocast(mode):
    problem = random_patterns(70, 16, 40, dtype=torch.float32)
    start = problem.u.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(problem, start, config(mode))
    outside = solve(problem, start.float(), config(mode))
    assert inside.value.dtype == torch.float32
    assert torch.equal(inside.value, outside.value)


def test_nothing_is_recorded_for_autograd():
    problem = random_patterns(10, 16, 40)
    problem = replace(problem, u=problem.u.requires_grad_())
    found = solve(problem, problem.u, config("simultaneous"), record=True)
    tensors = [found.value, found.energy, found.residual, *found.iterates]
    assert not any(x.requires_grad for x in tensors)
    assert found.start is problem.u  # as given, for an adjoint that goes back to it


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused(bad):
    problem = random_patterns(5, 16, 40)
    start = problem.u.clone()
    start[3, 2] = bad
    with pytest.raises(ValueError, match="z0 must be finite"):
        solve(problem, start, config("picard"))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_overflows_is_named_and_leaves_the_others_alone(mode):
    problem = quadratic(5, 8)
    start = torch.zeros_like(problem.u)
    healthy = solve(problem, start, config(mode))
    u = problem.u.clone()
    u[3] = 1e200  # its energy overflows
    sick = replace(problem, u=u)
    for quiet in ("warn", "ignore"):
        with pytest.warns(ConvergenceWarning, match="1 of 5 rows met a value that is not finite"):
            found = solve(sick, start, config(mode, on_nonconvergence=quiet))
        assert found.status.tolist() == [0, 0, 0, Status.NONFINITE, 0]
        assert found.value.isfinite().all() and not found.energy.isnan().any()
        keep = [0, 1, 2, 4]
        torch.testing.assert_close(found.value[keep], healthy.value[keep], rtol=1e-10, atol=1e-10)
    with pytest.raises(ConvergenceError, match="not finite"):
        solve(sick, start, config(mode))


def test_what_does_not_converge_is_said():
    problem = quadratic(7, 8)
    problem.u[:3] = 0
    start, settings = torch.zeros_like(problem.u), {"mode": "picard", "max_steps": 4}
    wanted = r"4 of 7 rows have not converged after 4 steps of mode 'picard': worst relative residual 0\.\d+.*max_steps"
    with pytest.warns(ConvergenceWarning, match=wanted):
        found = solve(problem, start, SolverConfig(**settings))
    assert found.status.tolist() == [0] * 3 + [Status.MAX_STEPS] * 4
    with pytest.raises(ConvergenceError, match=wanted):
        solve(problem, start, SolverConfig(**settings, on_nonconvergence="raise"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(problem, start, SolverConfig(**settings, on_nonconvergence="ignore"))
    narrow = replace(problem, u=problem.u.float(), a=problem.a.float())
    with pytest.warns(ConvergenceWarning, match="below what torch.float32 resolves"):
        solve(narrow, start.float(), SolverConfig(**settings, rtol=1e-9))
