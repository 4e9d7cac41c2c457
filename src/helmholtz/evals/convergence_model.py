"""Tests of the whole model: is its gradient that of the equilibrium, and does no token hear of its future."""

import copy
import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.evals.convergence_case import (
    SOLVER_MODES,
    AbstractTest,
    Check,
    ValidationCase,
    silent,
    solving_with,
)
from helmholtz.evals.equilibria import in_double, read
from helmholtz.models.decoder import Decoder
from helmholtz.models.outputs import LMOutput
from helmholtz.solvers import (
    AbstractAdjoint,
    ConvergenceError,
    Implicit,
    Phantom,
    SolverConfig,
    Unrolled,
    solve,
)
from helmholtz.solvers.spectrum import local_lipschitz

FEWEST_STEPS, MOST_STEPS = 20, 1000
UNROLLED_ERROR = 1e-12
"""What unrolled plain steps may leave of the start. Many more than that need would be all denormal numbers."""
STEP_LIMITS = (1, 3, 30)
"""Limits of the solver's steps: a row that is stopped unconverged must not depend on others either."""
ROUNDED = 1e-8
"""What 30 steps make of float64's roundings, at most: a mixture's weights lose 6 of its 16 digits."""
SMALLEST_SHARE = 1e-4
"""Gradients are compared relative to their norm, or to this part of the largest parameter's."""


@final
@dataclass(frozen=True, slots=True)
class GradientTest(AbstractTest):
    """The implicit gradient against the one through many plain steps, float64, of every parameter and the input."""

    worst_error: float
    """Largest relative error; infinite if the adjoint system was not solved."""
    worst_parameter: str
    input_error: float
    """Of the gradient with respect to the embedded tokens."""
    unrolled_steps: int
    tested_parameters: int
    without_gradient: tuple[str, ...]
    """Parameters that the implicit gradient does not reach: those of the start alone, in theory."""

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("error, parameters", self.worst_error, "<=", 1e-6),
            Check("error, input", self.input_error, "<=", 1e-6),
            Check("parameters tested", self.tested_parameters, ">", 0),
        )

    def notes(self) -> dict[str, float]:
        return {"unrolled steps": self.unrolled_steps}


@final
@dataclass(frozen=True, slots=True)
class CausalityTest(AbstractTest):
    """Largest changes of what came before a changed token, and of one sequence by another in its batch.

    Values are equilibria, energies, numbers of steps and logits, for all modes and stopped after 1, 3 and 30 steps, in
    float64 and relative to the largest. They are 0 but for rounding: rows that leave put the others elsewhere in a
    matrix product, and where a row is rounded in which way is the library's choice.
    """

    future_values: float
    future_gradients: float
    """Largest gradient of a token's logits with respect to a later token's embedding, under all adjoints: exactly 0."""
    row_values: float
    """Change of a row's solution if half of the other rows are solved without it."""
    batch_values: float
    """Change of logits and equilibria if a sequence is alone."""
    tested_values: int

    def checks(self) -> tuple[Check, ...]:
        return (
            Check("values before a change", self.future_values, "<=", ROUNDED),
            Check("gradients from the future", self.future_gradients, "<=", 0),
            Check("rows solved without others", self.row_values, "<=", ROUNDED),
            Check("a sequence alone", self.batch_values, "<=", ROUNDED),
            Check("values tested", self.tested_values, ">", 0),
        )


def check_gradient(case: ValidationCase) -> GradientTest:
    model = copy.deepcopy(case.model).double()
    exact = replace(
        case.model.solver, rtol=1e-12, energy_rtol=1e-12, max_steps=200, on_nonconvergence="ignore"
    )
    with solving_with(model, exact):
        found = read(model, case.tokens).equilibrium
    assert found is not None
    local = local_lipschitz(found.problem, found.solution.value, steps=100, generator=case.generator(8))
    largest = local.max()
    n_steps = _unrolled_steps(largest.item())
    generator = case.generator(9)
    shape = (*case.tokens.shape, model.config.vocab_size)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(found.z.device)
    start = found.z.detach()
    gradients = functools.partial(_gradients, model, case.tokens, start, exact, cotangent)
    try:
        implicit = gradients(Implicit(rtol=1e-10, max_steps=500))
    except ConvergenceError:
        return GradientTest(math.inf, "", math.inf, n_steps, 0, ())
    unrolled = gradients(Unrolled(n_steps=n_steps))
    scale = max(x.norm().item() for name, x in unrolled.items() if x is not None and name)
    errors = {name: _error(implicit[name], unrolled[name], SMALLEST_SHARE * scale) for name in implicit}
    input_error = errors.pop("")
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return GradientTest(
        worst_error=errors[worst],
        worst_parameter=worst,
        input_error=input_error,
        unrolled_steps=n_steps,
        tested_parameters=len(errors),
        without_gradient=tuple(name for name, gradient in implicit.items() if gradient is None),
    )


def _unrolled_steps(contraction: float) -> int:
    """So many that what they leave of the start is below ``UNROLLED_ERROR``, with some to spare, if they can."""
    if not contraction < 1:
        return MOST_STEPS
    needed = math.ceil(1.1 * math.log(UNROLLED_ERROR) / math.log(max(contraction, 1e-3)))
    return min(max(FEWEST_STEPS, needed), MOST_STEPS)


def _gradients(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    z_init: Float[Tensor, "B T D"],
    solver: SolverConfig,
    cotangent: Float[Tensor, "B T vocab"],
    adjoint: AbstractAdjoint,
) -> dict[str, Tensor | None]:
    """Of the logits along ``cotangent``, per parameter, and under the name "" with respect to the embedded tokens."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    with solving_with(model, solver, adjoint), torch.enable_grad():
        output, embedded = _with_embedding(model, tokens, z_init=z_init)
        total = (output.logits * cotangent).sum()
        found = torch.autograd.grad(total, [embedded, *parameters], allow_unused=True)
    return dict(zip(("", *names), found, strict=True))


def _with_embedding(
    model: Decoder, tokens: Int[Tensor, "B T"], *, z_init: Tensor | None = None
) -> tuple[LMOutput, Float[Tensor, "B T D"]]:
    """A call, and the embedded tokens that it read."""
    kept: list[Tensor] = []
    handle = model.embed.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        output = read(model, tokens, z_init=z_init)
    finally:
        handle.remove()
    return output, kept[0]


def _error(actual: Tensor | None, expected: Tensor | None, floor: float) -> float:
    """Relative error of a gradient; a missing one is 0."""
    if actual is None and expected is None:
        return 0.0
    actual = torch.zeros_like(expected) if actual is None else actual  # type: ignore[arg-type]
    expected = torch.zeros_like(actual) if expected is None else expected
    return ((actual - expected).norm() / max(expected.norm().item(), floor)).item()


def check_causality(case: ValidationCase) -> CausalityTest:
    model, tokens = copy.deepcopy(case.model).double(), case.tokens
    places = sorted({tokens.shape[1] // 2, tokens.shape[1] - 1})
    changes = [(place, _changed(case, place)) for place in places]
    future, rows, batch, tested = [], [], [], 0
    for mode, max_steps in itertools.product(SOLVER_MODES, STEP_LIMITS):
        solver = replace(silent(model.solver), mode=mode, max_steps=max_steps)
        with solving_with(model, solver):
            before = _values(read(model, tokens))
            for place, changed in changes:
                after = _values(read(model, changed))
                future += [_change(x[:, :place], y[:, :place]) for x, y in zip(before, after, strict=True)]
                tested += sum(x[:, :place].numel() for x in before)
            alone = zip(*(_values(read(model, row)) for row in tokens.split(1)), strict=True)
            batch += [_change(x, torch.cat(parts)) for x, parts in zip(before[:2], alone, strict=False)]
        rows.append(_row_change(case, solver))
    adjoints = (Implicit(), Phantom(n_steps=5), Unrolled(n_steps=30))
    return CausalityTest(
        future_values=_worst(future),
        future_gradients=_worst([_future_gradient(case, adjoint) for adjoint in adjoints]),
        row_values=_worst(rows),
        batch_values=_worst(batch),
        tested_values=tested,
    )


def _changed(case: ValidationCase, place: int) -> Int[Tensor, "B T"]:
    """The tokens with other ids from ``place`` on."""
    generator, size = case.generator(10 + place), case.model.config.vocab_size
    changed = case.tokens.clone()
    shift = torch.randint(1, size, changed[:, place:].shape, generator=generator).to(changed.device)
    changed[:, place:] = (changed[:, place:] + shift) % size
    return changed


def _values(output: LMOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = output.equilibrium
    assert found is not None
    return output.logits, found.z, found.energy, found.num_steps.to(found.z.dtype)


def _change(one: Tensor, other: Tensor) -> float:
    """Relative to the largest entry."""
    if not one.numel():
        return 0.0
    return ((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny)).item()


def _worst(values: list[float]) -> float:
    """The largest; NaN if any is."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _row_change(case: ValidationCase, solver: SolverConfig) -> float:
    """Solutions of every second row, with and without the rows between them."""
    problem, start, rows = in_double(case.problem), case.start.double(), torch.arange(0, len(case.start), 2)
    together = solve(problem, start, solver)
    alone = solve(problem.take(rows), start[rows], solver)
    pairs = ((together.value[rows], alone.value), (together.num_steps[rows], alone.num_steps))
    return _worst([_change(x.double(), y.double()) for x, y in pairs])


def _future_gradient(case: ValidationCase, adjoint: AbstractAdjoint) -> float:
    """Of a token in the middle, with respect to all later ones; NaN if the adjoint system was not solved."""
    time = (case.tokens.shape[1] - 1) // 2
    solver = silent(case.model.solver)
    with solving_with(case.model, solver, adjoint), torch.enable_grad():
        output, embedded = _with_embedding(case.model, case.tokens)
        try:
            (gradient,) = torch.autograd.grad(output.logits[:, time].square().sum(), embedded)
        except ConvergenceError:
            return math.nan
    return gradient[:, time + 1 :].abs().max().item()
