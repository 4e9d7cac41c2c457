import math
from dataclasses import replace

import pytest
import torch

from equilibrium_cases import random_problem
from helmholtz.evals import landscape_flow
from helmholtz.evals.equilibria import jacobian
from helmholtz.evals.landscape import EnergyLandscapeAnalyzer
from helmholtz.evals.landscape_case import BASES, TokenCase, choose_plane, memory_case, token_case
from helmholtz.evals.landscape_flow import MODES, basins, critical_point, saddles_between
from helmholtz.evals.landscape_plots import plot_basins, plot_memory, plot_slice, plot_trajectories
from helmholtz.layers.equilibrium import Equilibrium, TokenProblem
from helmholtz.layers.hopfield import HopfieldMemory
from helmholtz.layers.recall import AssociativeProblem
from helmholtz.ops.token_energy import EnergyParameters, TokenField, token_energy
from helmholtz.solvers import SolverConfig, solve

SOLVER = SolverConfig(on_nonconvergence="raise", max_steps=100)


def solved(problem, start, shape, index=None, solver=SOLVER):
    """The equilibrium of a call of ``shape`` tokens whose rows are those of ``problem``."""
    solution = solve(problem, start, solver)

    def scatter(x):
        if index is not None:
            x = x.new_full((math.prod(shape), x.shape[1]), torch.nan).index_copy(0, index, x)
        return x.view(*shape, -1)

    z = scatter(solution.value)
    start = scatter(start)
    return Equilibrium(
        context=start,
        output=z,
        z=z,
        z_init=start,
        retrieved=z,
        problem=problem,
        solution=solution,
        index=index,
        is_real=None,
    )


def contractive(rows=6, width=16, patterns=20, dtype=torch.float32):
    """Lipschitz constants below 0.8, several patterns, every term at work."""
    loose = random_problem(3, rows=rows, width=width, channels=12, patterns=patterns)
    weight = loose.parameters.weight / torch.linalg.matrix_norm(loose.parameters.weight, 2)
    kappa, strength = torch.tensor([0.4]), torch.tensor([0.4 / (2 * width**0.5)])
    parameters = loose.parameters._replace(weight=weight, kappa=kappa, strength=strength)
    field = TokenField(*(x.to(dtype) for x in loose.field))
    return TokenProblem(
        field, EnergyParameters(*(x.to(dtype) if torch.is_tensor(x) else x for x in parameters))
    )


def analyzer(problem=None, start=None):
    problem = problem or contractive()
    n = len(problem.field.u)
    start = problem.field.u + 1 if start is None else start
    return EnergyLandscapeAnalyzer(solved(problem, start, (2, n // 2)), SOLVER)


def memory_only(patterns, start, *, beta=2.0):
    """Plain associative memory: no input, no recurrence, full strength."""
    zero, one = torch.zeros(1, patterns.shape[1]), torch.ones(1, dtype=torch.float64)
    nothing = TokenField(zero.double(), *(torch.zeros(1, 1, dtype=torch.float64) for _ in range(3)))
    weight = torch.zeros(1, patterns.shape[1], dtype=torch.float64)
    problem = TokenProblem(nothing, EnergyParameters(weight, patterns, None, 0 * one, one, beta))
    return token_case(solved(problem, start.unsqueeze(0), (1, 1)), SOLVER)


def symmetric_patterns(n, width=12):
    """``n`` patterns of norm R at equal angles in a plane that is along no axis."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    generator = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64)).Q.T
    return width**0.25 * torch.stack([angle.cos(), angle.sin()], dim=-1) @ axes


@pytest.mark.parametrize("basis", BASES)
def test_a_slice_is_the_energy_at_its_points_and_lowest_at_the_equilibrium(basis):
    found = analyzer().slice(row=1, token=1, basis=basis, resolution=21)
    case, plane, ticks = found.case, found.plane, found.ticks
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
    for i, j in [(0, 0), (3, 17), (20, 5)]:
        z = case.z + ticks[i] * plane.axes[0] + ticks[j] * plane.axes[1]
        row = z.unsqueeze(0)
        energy = token_energy(row, case.problem.field, case.problem.parameters)
        torch.testing.assert_close(found.energy[j, i], energy[0] - case.energy)
        step = (case.problem.map(row) - row)[0]
        torch.testing.assert_close(found.residual[j, i], step.norm())
        torch.testing.assert_close(found.descent[j, i], plane.axes @ step)
    assert found.lowest == pytest.approx((0, 0), abs=1e-12)
    assert found.energy[10, 10].abs() < 1e-12 and (found.energy >= -1e-12).all()


def test_arrows_point_down_the_drawn_surface():
    found = analyzer().slice(resolution=81, radius=1.0)
    spacing = (found.ticks[1] - found.ticks[0]).item()
    along_y, along_x = torch.gradient(found.energy, spacing=spacing)
    inner = (slice(1, -1), slice(1, -1))
    slope = torch.stack([along_x, along_y], dim=-1)[inner]
    torch.testing.assert_close(found.descent[inner], -slope, atol=2e-3, rtol=0)


def test_a_grid_is_one_evaluation(monkeypatch):
    calls = []
    evaluate = TokenProblem.map_and_energy
    monkeypatch.setattr(
        TokenProblem, "map_and_energy", lambda self, z: calls.append(len(z)) or evaluate(self, z)
    )
    found = analyzer()
    case = found.case()
    calls.clear()
    case.evaluate(choose_plane(case).grid(torch.linspace(-1, 1, 41, dtype=torch.float64)))
    assert calls == [41**2]


def test_the_memory_plane_holds_what_competes():
    found = analyzer()
    case = found.case(row=0, token=2)
    plane = choose_plane(case, "memory")
    best = case.ranked_patterns()[:2].tolist()
    assert plane.anchors[:2] == tuple(best)
    assert plane.distance(case.patterns[best]).max() < 1e-9
    assert plane.names == tuple(f"towards pattern {index}" for index in best)
    torch.testing.assert_close(plane.coordinates(case.z), torch.zeros(2, dtype=torch.float64))


def test_hessian_axes_are_the_flattest_and_the_steepest_direction():
    case = analyzer().case()
    plane = choose_plane(case, "hessian")
    found = plane.axes @ jacobian(case.problem, 0, case.z) @ plane.axes.T
    values = torch.linalg.eigvalsh(jacobian(case.problem, 0, case.z))
    torch.testing.assert_close(found, torch.diag(values[[-1, 0]]))


def test_the_path_lies_in_its_plane():
    case = analyzer().case()
    plane = choose_plane(case, "path")
    assert plane.distance(case.start) < 0.02 * (case.start - case.z).norm()


def test_random_planes_follow_their_seed():
    case = analyzer().case()
    first, again, other = (choose_plane(case, "random", seed=seed).axes for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_token_is_found_by_row_and_place_among_real_ones():
    problem = contractive(rows=5)
    index = torch.tensor([0, 1, 3, 4, 5])  # token 2 of row 0 is a pad
    found = solved(problem, problem.field.u + 1, (2, 3), index)
    case = token_case(found, SOLVER, row=1, token=-1)
    assert torch.equal(case.problem.field.u[0], problem.field.u[4].double())
    torch.testing.assert_close(case.z.float(), found.z[1, 2], atol=1e-2, rtol=0)
    assert (case.problem.map(case.z.unsqueeze(0)) - case.z).norm() < 1e-10
    with pytest.raises(ValueError, match="token must be a real token of row 0, not a pad, got 2"):
        token_case(found, SOLVER, row=0, token=2)
    with pytest.raises(ValueError, match=r"row must be in \[0, 2\), the batch, got 2"):
        token_case(found, SOLVER, row=2)
    with pytest.raises(ValueError, match=r"token must be in \[-3, 3\), the sequence, got 3"):
        token_case(found, SOLVER, token=3)


def test_bad_arguments_are_named():
    found = analyzer()
    with pytest.raises(ValueError, match="resolution must be odd"):
        found.slice(resolution=10)
    with pytest.raises(ValueError, match="radius must be a finite number above 0, got -1"):
        found.basins(radius=-1.0)
    line = memory_only(symmetric_patterns(2), symmetric_patterns(2)[0])
    alone = replace(line, patterns=line.patterns[:1], start=line.z)
    with pytest.raises(ValueError, match="along one line"):
        choose_plane(alone, "memory")


def test_a_contraction_has_one_basin():
    found = analyzer().basins(resolution=15, radius=4.0)
    assert found.converged.all() and (found.label == 0).all()
    assert len(found.attractors) == 1 and found.shares == (1.0,)
    assert (found.attractors[0].z - found.case.z).norm() < 1e-6
    assert found.attractors[0].kind == "minimum"


@pytest.mark.parametrize("n", [2, 3])
def test_symmetric_patterns_share_the_plane_along_bisectors(n):
    patterns = symmetric_patterns(n)
    case = memory_only(patterns, patterns[0] + 0.1)
    plane = choose_plane(case)
    ticks = torch.linspace(-3, 3, 20, dtype=torch.float64)  # no point lies on a bisector
    found = basins(case, plane, ticks)
    assert found.converged.all()
    assert len(found.attractors) == n
    parts = [(found.label == number).double().mean().item() for number in range(n)]
    assert found.shares == pytest.approx(parts) and list(found.shares) == sorted(parts, reverse=True)
    assert {point.pattern for point in found.attractors} == set(range(n))
    ends = torch.tensor([point.pattern for point in found.attractors])[found.label.flatten()]
    scores = plane.grid(ticks) @ patterns.T
    nearest, decided = scores.argmax(-1), scores.sort(-1).values.diff(dim=-1)[:, -1] > 1e-6
    assert decided.float().mean() > 0.9
    assert torch.equal(ends[decided], nearest[decided])


def test_starts_that_are_not_solved_are_marked(monkeypatch):
    monkeypatch.setitem(landscape_flow.CLOSE, "max_steps", 2)
    found = analyzer().basins(resolution=5, radius=4.0)
    assert (~found.converged).any() and found.label.min() == -1
    assert sum(found.shares) == pytest.approx(found.converged.double().mean().item())


def test_a_saddle_is_told_from_minima_however_few_its_falling_directions():
    patterns = symmetric_patterns(2, width=32)
    case = memory_only(patterns, patterns[0])
    ridge = critical_point(case, torch.zeros(32, dtype=torch.float64))
    assert (ridge.kind, ridge.num_descending) == ("saddle", 1)
    assert ridge.gradient_norm < 1e-12
    # J = lambda beta R^2 along the line of the patterns, 0 across
    assert ridge.smallest_curvature == pytest.approx(1 - 2 * math.sqrt(32))
    assert critical_point(case, case.z).kind == "minimum"
    assert ridge.pattern_weight == pytest.approx(0.5) and critical_point(case, case.z).pattern_weight > 0.99
    plane = choose_plane(replace(case, start=case.start + 1))  # everything else is on one line
    found = basins(case, plane, torch.linspace(-3, 3, 10, dtype=torch.float64))
    (saddle,) = saddles_between(case, found.attractors)
    assert saddle.z.norm() < 1e-8
    assert saddle.energy == pytest.approx(ridge.energy)


def test_trajectories_are_the_solvers_own_iterates():
    case = analyzer().case(row=1, token=0)
    found = analyzer().trajectories(row=1, token=0)
    assert tuple(path.mode for path in found.paths) == MODES
    for path in found.paths:
        config = replace(SOLVER, mode=path.mode, **landscape_flow.CLOSE)
        solution = solve(case.problem, case.start.unsqueeze(0), config, record=True)
        assert torch.equal(path.iterates, torch.cat(solution.iterates))
        torch.testing.assert_close(path.energy + case.energy, torch.cat(solution.energies))
        assert torch.equal(path.iterates[0], case.start)
        assert path.residual[-1] <= 1e-8 and path.converged and path.ends_at_equilibrium
        if path.mode != "cascade":
            assert (path.energy.diff() <= 1e-12).all()
    plain = found.paths[-1]
    config = replace(SOLVER, mode="picard", rtol=1e-4, energy_rtol=1.0)
    assert plain.num_steps(1e-4) == int(solve(case.problem, case.start.unsqueeze(0), config).num_steps)
    assert plain.num_steps(1e-30) is None
    distance = (plain.iterates - case.z).norm(dim=-1)[:-1]
    assert (distance[1:] <= found.certificate * distance[:-1] + 1e-9).all()
    assert 0 < found.contraction <= found.certificate < 1
    assert 0.9 < found.explained <= 1


def test_the_memory_counts_what_tokens_retrieve():
    problem = contractive(rows=4, patterns=9)
    prior = torch.zeros(9)
    prior[[2, 5]] = -torch.inf
    problem = TokenProblem(problem.field, problem.parameters._replace(log_prior=prior))
    found = analyzer(problem).memory()
    assert (
        found.usage.shape == (7,) and found.coordinates.shape == (7, 2) and found.equilibria.shape == (4, 2)
    )
    assert found.usage.sum() == pytest.approx(1)
    kept = problem.parameters.patterns[[0, 1, 3, 4, 6, 7, 8]].double()
    z = analyzer(problem).equilibrium.z.flatten(0, 1).double()
    weights = (2 * z @ kept.T).softmax(-1)
    torch.testing.assert_close(found.usage, weights.mean(0))
    assert found.token_entropy == pytest.approx(-(weights * weights.log()).sum(-1).mean().item())
    assert found.most_used[0] == weights.mean(0).argmax()
    torch.testing.assert_close(found.cosine.diagonal(), torch.ones(7, dtype=torch.float64))
    one, two = kept[found.most_used[0]], kept[found.most_used[1]]
    torch.testing.assert_close(found.cosine[0, 1], one @ two / (one.norm() * two.norm()))
    assert -1 <= found.largest_cosine < 1


def test_an_empty_memory_is_refused_by_name():
    problem = contractive(rows=2, patterns=3)
    prior = torch.full((3,), -torch.inf)
    problem = TokenProblem(problem.field, problem.parameters._replace(log_prior=prior))
    with pytest.raises(ValueError, match="memory must be a memory with patterns"):
        analyzer(problem).memory()
    assert isinstance(analyzer(problem).case(), TokenCase)


def test_pictures_are_small_and_leave_no_figure(tmp_path):
    from matplotlib import pyplot

    found = analyzer()
    around = found.basins(resolution=11)
    plot_slice(found.slice(resolution=21), tmp_path / "a" / "slice.png", title="slice")
    plot_trajectories(found.trajectories(), tmp_path / "trajectories.png", title="paths")
    plot_basins(around, tmp_path / "basins.png", title="basins", points=found.critical_points(around))
    plot_memory(found.memory(), tmp_path / "memory.png", title="memory")
    files = sorted(tmp_path.rglob("*.png"))
    assert [file.name for file in files] == ["slice.png", "basins.png", "memory.png", "trajectories.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 150_000
    assert pyplot.get_fignums() == []


def test_a_memorys_case_is_its_recall_and_has_a_minimum_per_pattern():
    memory = HopfieldMemory(16, 0, n_slots=5, beta=4.0)
    memory.write(torch.eye(16)[:3])
    case = memory_case(memory, memory.radius * torch.eye(16)[1] + 0.2)
    z = torch.randn(7, 16, dtype=torch.float64)
    step, energy = case.evaluate(z)
    recall = AssociativeProblem(memory.patterns().double(), memory.beta, memory.log_prior().double())
    mapped, of_recall = recall.map_and_energy(z)
    assert (step - mapped + z).abs().max() < 1e-12
    assert (energy - energy[0] - of_recall + of_recall[0]).abs().max() < 1e-12
    assert (case.z - memory.retrieve(case.start.float().unsqueeze(0)).value[0]).abs().max() < 1e-3
    assert len(case.patterns) == 3
    found = basins(case, choose_plane(case), torch.linspace(-3, 3, 21, dtype=torch.float64))
    minima = [point for point in found.attractors if point.kind == "minimum"]
    assert sorted(point.pattern for point in minima) == [0, 1, 2]
    assert all(point.pattern_weight > 0.9 for point in minima)
