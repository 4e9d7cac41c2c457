"""Modes of the solver on token energies: steps, work, time, and whether the energy fell at every step.

Problems: random patterns in the contractive regime, two opposite patterns with queries between them (the slowest map
that the regime allows), memories with many equilibria, and random patterns at D = 512 with 5,000 of them. Each row of a
problem is a token. Next to it torchdeq's Anderson on the same map, if that package is installed
(``pip install --no-deps torchdeq==0.1.0``), and the error of gradients against a long unrolled iteration in float64.

    python benchmarks/solvers/run.py --threads 2
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import interleave, parse_options, print_table, write_results

from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.ops.token_energy import EnergyParameters, TokenField
from helmholtz.solvers import Implicit, Phantom, Solution, SolverConfig, Unrolled, solve

MODES = ("alternating", "simultaneous", "cascade", "picard", "anderson")
BETA, BOUND, SEED = 2.0, 0.9, 0
FLOOR = 2e-6
"""Of a residual evaluated in float32: logits of retrieval reach 16, each with half a rounding."""
HAS_TORCHDEQ = importlib.util.find_spec("torchdeq") is not None


class Case(NamedTuple):
    """A problem in float64, where to start, the tolerance, and a bound of its contraction (1 or more: none)."""

    name: str
    problem: TokenProblem
    start: Tensor
    rtol: float
    contraction: float


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def token_problem(u: Tensor, patterns: Tensor, *, kappa: float, strength: float) -> TokenProblem:
    """Random fields, a state-space term of twice the width with ``|W|_2 = 1``, the given patterns."""
    n, width = u.shape
    weight = torch.randn(2 * width, width, dtype=torch.float64)
    weight = weight / torch.linalg.matrix_norm(weight, 2)
    a, gate, delta = torch.randn(3, n, 2 * width, dtype=torch.float64)
    scalars = [torch.tensor([x], dtype=torch.float64) for x in (kappa, strength)]
    field = TokenField(u, a, gate.sigmoid(), delta.sigmoid())
    return TokenProblem(field, EnergyParameters(weight, patterns, None, *scalars, BETA))


def contractive(name: str, width: int, n_patterns: int, rtol: float, n: int = 256) -> Case:
    radius = width**0.25
    half = BOUND / 2
    problem = token_problem(
        radius * unit(n, width),
        radius * unit(n_patterns, width),
        kappa=half,
        strength=half / (BETA * radius**2),
    )
    return Case(name, problem, problem.field.u, rtol, BOUND)


def antipodal(rtol: float, width: int = 64, n: int = 256) -> Case:
    """Queries up to 1 % of the patterns' norm off the ridge between ``m`` and ``-m``, where ``|J| = 0.9``."""
    radius = width**0.25
    pattern = unit(1, width)
    across = torch.randn(n, width, dtype=torch.float64)
    u = radius * F.normalize(across - (across @ pattern.T) * pattern, dim=1)
    patterns = radius * torch.cat([pattern, -pattern])
    problem = token_problem(u, patterns, kappa=0.0, strength=BOUND / (BETA * radius**2))
    offset = radius * torch.linspace(0.001, 0.01, n, dtype=torch.float64).unsqueeze(1)
    return Case("antipodal", problem, u + offset * pattern, rtol, BOUND)


def memory(name: str, rtol: float, width: int = 64, n: int = 256, n_patterns: int = 512) -> Case:
    """Retrieval with an equilibrium near every pattern. Queries are patterns with noise of their own norm ("memory"),
    or are pulled to one place and start at another ("torn")."""
    radius = width**0.25
    patterns = radius * unit(n_patterns, width)
    if name == "memory":
        u, start = torch.zeros(n, width, dtype=torch.float64), patterns[:n] + radius * unit(n, width)
    else:
        u, start = radius * unit(n, width), 3 * radius * unit(n, width)
    return Case(name, token_problem(u, patterns, kappa=0.0, strength=1.0), start, rtol, 1.0)


def narrow(problem: TokenProblem, dtype: torch.dtype = torch.float32) -> TokenProblem:
    field = TokenField(*(x.to(dtype) for x in problem.field))
    parameters = [x.to(dtype) if isinstance(x, Tensor) else x for x in problem.parameters]
    return TokenProblem(field, EnergyParameters(*parameters))


def settings(mode: Any, rtol: float) -> SolverConfig:
    return SolverConfig(mode=mode, rtol=rtol, energy_rtol=rtol, max_steps=200, on_nonconvergence="ignore")


def relative_residual(problem: TokenProblem, z: Tensor) -> Tensor:
    f = problem.map(z.double())
    return (f - z.double()).norm(dim=1) / f.norm(dim=1)


def check(case: Case, who: str, z: Tensor, converged: Tensor, best: Tensor) -> None:
    """The residual in float64 keeps the tolerance; so does the distance from ``best`` if there is one equilibrium."""
    residual = relative_residual(case.problem, z)[converged]
    if not (residual <= 1.1 * case.rtol + FLOOR).all():
        raise RuntimeError(
            f"{case.name}, {who}: residual {residual.max():.3g}, said to be below {case.rtol:g}"
        )
    if case.contraction < 1:
        off = (z.double() - best).norm(dim=1) / best.norm(dim=1)
        if not (off <= 2 * (case.rtol + FLOOR) / (1 - case.contraction)).all():
            raise RuntimeError(f"{case.name}, {who}: {off.max():.3g} from the equilibrium")


def rises(solution: Solution) -> int:
    """Steps of rows that raised the energy by more than rounding."""
    assert solution.energies is not None
    energy = torch.stack(solution.energies)
    return int((energy.diff(dim=0) > 1e-5 * (1 + energy[:-1].abs())).sum())


def row(
    case: Case, who: str, steps: Tensor, evaluations: float, products: float, converged: float
) -> dict[str, Any]:
    return {
        "problem": case.name,
        "rtol": case.rtol,
        "solver": who,
        "steps_mean": steps.double().mean().item(),
        "steps_max": int(steps.max()),
        "evaluations": evaluations,
        "products": products,
        "converged": converged,
    }


def torchdeq_run(problem: TokenProblem, start: Tensor, rtol: float) -> tuple[Tensor, Tensor, int]:
    """Value, steps per row, calls of the map on all rows; its own settings but for tolerance and limit."""
    from torchdeq import get_deq

    calls = []

    def counted(z: Tensor) -> Tensor:
        calls.append(1)
        return problem.map(z)

    deq = get_deq(f_solver="anderson", f_max_iter=200, f_tol=rtol, f_stop_mode="rel").eval()
    values, info = deq(counted, start)
    return values[-1], info["nstep"], len(calls)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    problem, start = narrow(case.problem), case.start.float()
    best = solve(case.problem, case.start, settings("simultaneous", 1e-12)).value
    rows, runs = [], {}
    for mode in MODES:
        config = settings(mode, case.rtol)
        found = solve(problem, start, config, record=True)
        check(case, mode, found.value, found.converged, best)
        plain = solve(problem, start, config)
        counts = [
            x.double().mean().item() for x in (plain.num_evaluations, plain.num_products, plain.converged)
        ]
        rows.append(row(case, mode, plain.num_steps, *counts) | {"rises": rises(found)})
        runs[mode] = lambda config=config: solve(problem, start, config)
    if HAS_TORCHDEQ:
        with torch.no_grad():
            value, steps, calls = torchdeq_run(problem, start, case.rtol)
        done = relative_residual(case.problem, value) <= 1.1 * case.rtol + FLOOR
        rows.append(row(case, "torchdeq", steps, calls, 0.0, done.double().mean().item()) | {"rises": None})
        runs["torchdeq"] = torch.no_grad()(lambda: torchdeq_run(problem, start, case.rtol))
    seconds = interleave(runs, rounds=rounds, warmup=1)
    return [r | {"milliseconds": 1e3 * seconds[r["solver"]]} for r in rows]


def gradients(problem: TokenProblem, value: Callable[[TokenProblem], Tensor]) -> list[Tensor]:
    """Of a fixed random loss, in all fields and parameters."""
    leaves = [
        x.detach().clone().requires_grad_()
        for x in (*problem.field, *problem.parameters)
        if isinstance(x, Tensor)
    ]
    given = iter(leaves)
    field = TokenField(*(next(given) for _ in problem.field))
    parameters = EnergyParameters(*(next(given) if isinstance(x, Tensor) else x for x in problem.parameters))
    z = value(TokenProblem(field, parameters))
    weight = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view_as(z)
    found = torch.autograd.grad((z.double().sin() * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def gradient_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst of the tensors, each relative to its norm; those whose gradient is 0 but for rounding are left out."""
    largest = max(w.norm().item() for w in want)
    pairs = [(g.double(), w) for g, w in zip(got, want, strict=True) if w.norm() > 1e-9 * largest]
    return max(((g - w).norm() / w.norm()).item() for g, w in pairs)


def measure_gradients(case: Case) -> list[dict[str, Any]]:
    long = solve(case.problem, case.start, settings("simultaneous", 1e-12))
    exact = gradients(case.problem, lambda p: Unrolled(n_steps=400).attach(p, long))
    problem, start = narrow(case.problem), case.start.float()

    def ours(adjoint: Any, rtol: float) -> Callable[[TokenProblem], Tensor]:
        return lambda p: adjoint.attach(p, solve(p, start.to(p.field.u), settings("alternating", rtol)))

    def theirs(**more: Any) -> Callable[[TokenProblem], Tensor]:
        from torchdeq import get_deq

        deq = get_deq(f_solver="anderson", f_max_iter=200, f_tol=1e-6, f_stop_mode="rel", **more).train()
        return lambda p: deq(p.map, start)[0][-1]

    ways = {
        "implicit, float64, rtol 1e-10": (case.problem, ours(Implicit(rtol=1e-10), 1e-10)),
        "implicit, rtol 1e-6": (problem, ours(Implicit(), 1e-6)),
        "implicit, rtol 1e-3": (problem, ours(Implicit(), 1e-3)),
        "phantom, 1 step": (problem, ours(Phantom(n_steps=1), 1e-6)),
        "phantom, 5 steps": (problem, ours(Phantom(n_steps=5), 1e-6)),
    }
    if HAS_TORCHDEQ:
        ways["torchdeq, its default"] = (problem, theirs())
        ways["torchdeq, ift=True"] = (problem, theirs(ift=True))
    rows = []
    for name, (given, value) in ways.items():
        error = gradient_error(gradients(given, value), exact)
        rows.append({"problem": case.name, "gradient": name, "relative_error": error})
    if not rows[0]["relative_error"] < 1e-6:
        raise RuntimeError(f"{case.name}: the implicit gradient is wrong by {rows[0]['relative_error']:.3g}")
    return rows


def main() -> None:
    options = parse_options("solvers", __doc__, rounds=7)
    torch.manual_seed(SEED)
    cases = [contractive("contractive", 64, 512, rtol) for rtol in (1e-3, 1e-6)]
    cases += [antipodal(1e-6), memory("memory", 1e-6), memory("torn", 1e-6)]
    cases += [contractive("large", 512, 5000, 1e-3)]
    if not HAS_TORCHDEQ:
        print("torchdeq is not installed: no rows of it")
    solves = [r for case in cases for r in measure(case, options.rounds)]
    print_table(solves)
    small = [contractive("contractive", 64, 512, 1e-6, n=64), antipodal(1e-6, n=64)]
    errors = [r for case in small for r in measure_gradients(case)]
    print_table(errors)
    write_results(options, [r | {"seed": SEED} for r in solves + errors])


if __name__ == "__main__":
    main()
