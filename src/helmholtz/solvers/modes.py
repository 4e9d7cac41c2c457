"""``solve``: the five ways to an equilibrium."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._checks import check
from helmholtz._values import has_values, worth_reading
from helmholtz.solvers.anderson import Anderson
from helmholtz.solvers.base import AbstractProblem, Solution, SolverConfig, Status, warn_or_raise
from helmholtz.solvers.loop import (
    AbstractRule,
    Outcome,
    Point,
    Rows,
    Trace,
    evaluate,
    iterate,
    row_dot,
    row_norm,
)
from helmholtz.solvers.newton_cg import Newton
from helmholtz.solvers.picard import Picard

SLOW_STEPS = 10
"""Rows that took more are looked at for a saddle."""

POWER_STEPS = 3


def solve(
    problem: AbstractProblem, z0: Float[Tensor, "N D"], config: SolverConfig, *, record: bool = False
) -> Solution:
    r"""Find an equilibrium of every row from ``z0``, in at least float32 also under autocast.

    The value comes without gradient; an adjoint's ``attach`` gives it one.

    A row has converged if :math:`|r| / (|f| + 10^{-9}) \le` ``rtol`` and :math:`|E_k - E_{k-1}| \le` ``energy_rtol``
    :math:`(1 + |E_k|)`; it is then frozen. Rows never meet: what others change is a row's place in
    a matrix product, and with it the rounding (``docs/solvers.md`` has the bounds).

    In a compiled or exported graph and on fake tensors, where no values can be looked at, every row makes
    ``max_steps`` steps, of which those after its end change nothing. Nothing is checked, reported or recorded there,
    and no saddle is looked for.

    Args:
        record: keep iterates and energies of every step.

    Raises: ValueError for a ``z0`` that is not finite. If a row does not converge, as ``config.on_nonconvergence``
        says; a row that stops being finite is never ignored, it warns at least.
    """
    check(z0.is_floating_point(), "z0", z0.dtype, "of a floating-point dtype")
    if worth_reading(z0):
        check(bool(z0.isfinite().all()), "z0", "NaN or infinity", "finite")
    start = z0.to(torch.promote_types(z0.dtype, torch.float32))
    with torch.no_grad(), torch.autocast(z0.device.type, enabled=False):
        z0 = start.detach()
        rows, trace = Rows.of(problem, z0), Trace(record=record)
        outcome = _run(rows, z0, config, trace) if z0.shape[0] else _nothing(z0)
        unstable = _saddles(rows, outcome)
    point = Point(*(x.detach() for x in outcome.point))  # forward mode goes through no_grad
    solution = Solution(
        value=point.z,
        start=start,
        status=outcome.status,
        num_steps=outcome.num_steps,
        num_evaluations=rows.counts.evaluations,
        num_products=rows.counts.products,
        residual=point.residual,
        energy=point.energy,
        energy_change=point.change,
        unstable=unstable,
        energy_history=trace.energy_history,
        residual_history=trace.residual_history,
        iterates=trace.iterates,
        energies=trace.energies,
    )
    if worth_reading(z0) or (has_values(z0) and config.on_nonconvergence == "raise"):
        _report(solution, config)
    return solution


def _run(rows: Rows, z0: Float[Tensor, "N D"], config: SolverConfig, trace: Trace) -> Outcome:
    start = evaluate(rows, z0, None)
    trace.begin(start)
    trace.add(energies=True)
    if config.mode == "cascade":
        return _cascade(rows, start, config, trace)
    limit = z0.new_full((z0.shape[0],), config.max_steps, dtype=torch.long)
    return iterate(rows, start, _rule(config), config, limit, trace)


def _rule(config: SolverConfig) -> AbstractRule:
    if config.mode == "alternating":
        return Anderson(config.anderson_window, config.damping)
    if config.mode == "simultaneous":
        return Newton(config.newton_cg_steps)
    return Anderson(config.anderson_window) if config.mode == "anderson" else Picard(config.damping)


def _cascade(rows: Rows, start: Point, config: SolverConfig, trace: Trace) -> Outcome:
    """Mix until the residual is small or half of the steps are gone, then descend: a row that went uphill in the first
    phase starts the second where it started the first."""
    limit = start.z.new_full((start.z.shape[0],), config.max_steps, dtype=torch.long)
    mixing = Anderson(config.anderson_window)
    first = iterate(rows, start, mixing, config, limit // 2, trace, energies=False)
    middle = evaluate(rows, first.point.z, None)
    uphill = ~(middle.energy <= start.energy)
    middle.put(rows.index, start, uphill)
    descent = Newton(config.newton_cg_steps, plain_steps=1)
    second = iterate(rows, middle, descent, config, limit - first.num_steps, trace)
    return Outcome(second.point, second.status, first.num_steps + second.num_steps)


def _nothing(z0: Float[Tensor, "0 D"]) -> Outcome:
    none = z0.new_zeros(0)
    return Outcome(Point(z0, z0, none, none, none), none.long(), none.long())


def _saddles(rows: Rows, outcome: Outcome) -> Bool[Tensor, "N"]:
    """Slow converged rows at which a Rayleigh quotient of the Jacobian, a lower bound of its norm, is above 1."""
    unstable = torch.zeros_like(outcome.status, dtype=torch.bool)
    if not worth_reading(unstable):
        return unstable
    slow = (outcome.status == int(Status.CONVERGED)) & (outcome.num_steps > SLOW_STEPS)
    index = slow.nonzero().squeeze(1)
    if not len(index):
        return unstable
    z, rows = outcome.point.z[index], rows.take(index)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape[1], generator=generator, dtype=torch.float64).to(z).expand_as(z)
    for _ in range(POWER_STEPS):
        v = v / (row_norm(v).unsqueeze(1) + torch.finfo(z.dtype).tiny)
        image = rows.jvp(z, v)
        unstable[index] = row_dot(v, image) > 1
        v = image
    return unstable


def _report(solution: Solution, config: SolverConfig) -> None:
    """Warn or raise about rows that have not converged."""
    unsolved = solution.status == int(Status.MAX_STEPS)
    lost, open_rows = int((solution.status == int(Status.NONFINITE)).sum()), int(unsolved.sum())
    if not lost and (not open_rows or config.on_nonconvergence == "ignore"):
        return
    total, parts = len(solution.status), []
    if lost:
        parts.append(
            f"{lost} of {total} rows met a value that is not finite: the map or the energy overflows, "
            "look at the parameters and the start"
        )
    if open_rows:
        worst = solution.residual[unsolved].max().item()
        change = solution.energy_change[unsolved].max().item()
        parts.append(
            f"{open_rows} of {total} rows have not converged after {config.max_steps} steps of mode "
            f"{config.mode!r}: worst relative residual {worst:.3g} (rtol={config.rtol:g}), worst change of energy "
            f"{change:.3g} (energy_rtol={config.energy_rtol:g}). {_advice(config, solution.value.dtype)}"
        )
    warn_or_raise("; ".join(parts), config.on_nonconvergence, stacklevel=4)


def _advice(config: SolverConfig, dtype: torch.dtype) -> str:
    if config.rtol < 8 * torch.finfo(dtype).eps:
        return f"This rtol is below what {dtype} resolves: raise it or compute in float64"
    other = "simultaneous" if config.mode == "alternating" else "alternating"
    return f"Raise max_steps or the tolerances, or try mode={other!r}"
