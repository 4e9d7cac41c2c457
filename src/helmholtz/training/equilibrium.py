"""Training of equilibrium models: cross-entropy, and what makes equilibria cheap to find, stable and near patterns."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz._checks import check, check_integer, check_non_negative, check_positive
from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer
from helmholtz.layers.equilibrium_reading import (
    active_patterns,
    equilibrium_statistics,
    is_mean_retrieval,
    retrieval_energy,
    start_distance,
)
from helmholtz.models.decoder import Decoder, require_equilibrium
from helmholtz.ops.losses import cross_entropy
from helmholtz.solvers import SolverConfig
from helmholtz.solvers.spectrum import local_lipschitz
from helmholtz.training.distributed import gather_rows
from helmholtz.training.objectives import Objective, Report

ENOUGH_CONVERGED = 0.99
"""Fraction of converged tokens below which an evaluation warns."""
POWER_STEPS = 8
"""Products with the Jacobian per training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverStage:
    """How carefully equilibria are solved for in training from some step on."""

    from_step: int
    """Optimizer steps after which the stage begins."""
    max_steps: int
    """Largest number of solver steps."""
    rtol: float
    """The solver's rtol and energy_rtol."""

    def __post_init__(self) -> None:
        check_integer("objective.curriculum.from_step", self.from_step, minimum=0)
        check_integer("objective.curriculum.max_steps", self.max_steps)
        check_positive("objective.curriculum.rtol", self.rtol)


@dataclass(frozen=True, kw_only=True)  # without slots: it is the second base of a config that has them
class EquilibriumObjectiveConfig:
    """Terms that are added to the cross-entropy of a model with an equilibrium, and schedules of its training."""

    energy_weight: float = 0.0
    """Weight of the retrieval energy, which pulls equilibria and patterns towards each other."""
    convergence_weight: float = 0.05
    """Weight of the distance from start to equilibrium; it trains only the start, to save solver steps."""
    stability_weight: float = 0.0
    """Weight of the squared excess of the map's local Lipschitz constant over contraction_target."""
    contraction_target: float = 0.9
    """Local Lipschitz constant up to which there is no penalty."""
    curriculum: tuple[SolverStage, ...] = ()
    """Solver settings by training stage, in order of from_step; before the first stage, and in evaluations, those of
    model.solver."""
    memory_write_step: int | None = None
    """Optimizer steps after which training writes novel equilibria into the writable patterns; None: never."""
    memory_lr_factor: float = 1.0
    """Learning rate of the memory's learned patterns, as a multiple of lr."""

    def __post_init__(self) -> None:
        for name in ("energy_weight", "convergence_weight", "stability_weight", "contraction_target"):
            check_non_negative(f"objective.{name}", getattr(self, name))
        check_positive("objective.memory_lr_factor", self.memory_lr_factor)
        if self.memory_write_step is not None:
            check_integer("objective.memory_write_step", self.memory_write_step, minimum=0)
        steps = [stage.from_step for stage in self.curriculum]
        growing = all(before < after for before, after in zip(steps, steps[1:], strict=False))
        check(growing, "objective.curriculum", steps, "stages with growing from_step")

    def stage(self, step: int) -> SolverStage | None:
        """The stage after ``step`` optimizer steps; None before the first."""
        begun = [stage for stage in self.curriculum if stage.from_step <= step]
        return begun[-1] if begun else None

    def writes(self, step: int) -> bool:
        """Whether training writes into the memory after ``step`` optimizer steps."""
        return self.memory_write_step is not None and step >= self.memory_write_step


class EquilibriumObjective:
    r"""Cross-entropy, and three terms of the equilibria whose weights may be 0 and then cost nothing:

    .. math:: \ell = -\frac1T \sum_t \log p(x_{t+1} | x_{\le t}) + w_E L_E + w_c L_c + w_s L_s

    ``energy`` (``retrieval_energy``), ``convergence`` (``start_distance``) and ``stability``
    (``contraction_excess``). The bound is the cross-entropy alone. Beside them, ``num_steps`` and ``unconverged`` say
    how the solver fared: mean steps and fraction of tokens.

    While the model trains, the curriculum's solver replaces the model's for the call and unconverged tokens are
    counted, not warned of (a solver with ``on_nonconvergence="raise"`` still raises where no stage replaces it); novel
    equilibria are written into the memory after the forward pass. In evaluation mode the solver is the model's own and
    nothing is written.

    Args:
        seed: of the random vectors that the power iteration starts at, the same in every call.
        n_targets: only so many last tokens are asked for, as in ``objectives.last_tokens``; None asks for all.
    """

    def __init__(
        self, config: EquilibriumObjectiveConfig, *, seed: int = 0, n_targets: int | None = None
    ) -> None:
        self.config, self.seed, self.n_targets = config, seed, n_targets

    def __call__(self, model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> Objective:
        with self.solving(model, step):
            output = model(tokens[:, :-1], targets=tokens[:, 1:] if self.n_targets is None else None)
        if self.n_targets is None:
            nats = output.nats
        else:
            nats = cross_entropy(output.logits[:, -self.n_targets :], tokens[:, -self.n_targets :])
        plain = Objective(nats, {"cross_entropy": nats.detach()}, nats.detach())
        return self.added(model, output.equilibrium, plain, step)

    @contextlib.contextmanager
    def solving(self, model: nn.Module, step: int) -> Iterator[None]:
        """The model solves as its training asks for after ``step`` optimizer steps."""
        model, _ = _with_equilibria(model)
        with training_solver(model, self.config.stage(step) if model.training else None):
            yield

    def added(self, model: nn.Module, found: Equilibrium, to: Objective, step: int) -> Objective:
        """An objective and the equilibria's terms; the bound stays. Writes into the memory if it is time to."""
        (model, layer), c = _with_equilibria(model), self.config
        weighted, loss = self.terms(layer, found), to.loss
        for weight, term in weighted.values():
            loss = loss + weight * term
        if model.training and c.writes(step):
            rows, chosen = found.rows(found.z).detach(), found.solution.converged
            model.memory.write(gather_rows(rows), gather_rows(chosen), warn=False)
        terms = {name: term for name, (_, term) in weighted.items()}
        terms["num_steps"] = found.solution.num_steps.float().mean()
        terms["unconverged"] = (~found.solution.converged).float().mean()
        return replace(to, loss=loss, terms=to.terms | {name: term.detach() for name, term in terms.items()})

    def terms(
        self, layer: EquilibriumLayer, found: Equilibrium
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        """Weight and term by name; without those of weight 0."""
        c, terms = self.config, dict[str, tuple[float, Float[Tensor, ""]]]()
        if c.energy_weight:
            terms["energy"] = (c.energy_weight, retrieval_energy(layer, found).mean())
        if c.convergence_weight:
            terms["convergence"] = (c.convergence_weight, start_distance(layer, found).mean())
        if c.stability_weight:
            excess = contraction_excess(found, c.contraction_target, seed=self.seed)
            terms["stability"] = (c.stability_weight, excess)
        return terms

    def report(self, model: nn.Module, batches: Sequence[Int[Tensor, "_ _"]], step: int) -> Report:
        """``equilibrium_statistics`` of the text under the model's own solver, and what is wrong with them."""
        model, layer = _with_equilibria(model)
        with training_solver(model, None):
            calls = (model(tokens[:, :-1]).equilibrium for tokens in batches)
            statistics = equilibrium_statistics(layer, calls)
        return Report(statistics, _warnings(layer, statistics))


def contraction_excess(found: Equilibrium, target: float, *, seed: int = 0) -> Float[Tensor, ""]:
    r"""Mean of :math:`\max(0, L - L_\mathrm{target})^2` over all tokens, at their equilibria and at their starts.

    :math:`L` is the largest eigenvalue of the Jacobian there. At a minimum of the energy it is at most 1, so that only
    the starts show what makes the way there long. Both points count as constant, as in Jacobian regularisation (Bai et
    al. 2021): the gradient is that of the energy's coefficients.
    """
    points = (found.rows(found.z).detach(), found.rows(found.z_init).detach())
    excess = []
    for z in points:
        generator = torch.Generator().manual_seed(seed)
        constant = local_lipschitz(found.problem, z, steps=POWER_STEPS, generator=generator)
        excess.append((constant - target).relu().square().mean())
    return torch.stack(excess).mean()


@contextlib.contextmanager
def training_solver(model: Decoder, stage: SolverStage | None) -> Iterator[None]:
    """The model solves as ``stage`` says, or as ever if None, and leaves it to the caller to count what is unsolved."""
    own: SolverConfig = model.solver
    quiet = "ignore" if stage is not None or own.on_nonconvergence == "warn" else own.on_nonconvergence
    changed = replace(own, on_nonconvergence=quiet)
    if stage is not None:
        changed = replace(changed, max_steps=stage.max_steps, rtol=stage.rtol, energy_rtol=stage.rtol)
    model.solver = changed
    try:
        yield
    finally:
        model.solver = own


def _warnings(layer: EquilibriumLayer, statistics: dict[str, float]) -> dict[str, str]:
    warnings = dict[str, str]()
    if statistics["converged"] < ENOUGH_CONVERGED:
        n_tokens = round(statistics["n_tokens"])
        n_open = round((1 - statistics["converged"]) * n_tokens)
        warnings["unconverged"] = (
            f"{n_open:,} of {n_tokens:,} tokens did not converge (mean relative residual "
            f"{statistics['residual']:.1e}); a larger model.solver.max_steps or model.solver.rtol, "
            "objective.convergence_weight, objective.stability_weight or a lower train.lr may help"
        )
    entropy = statistics["retrieval_entropy"]
    if is_mean_retrieval(layer, entropy):
        n_active = active_patterns(layer)
        warnings["retrieval_collapsed"] = (
            f"retrieval is the mean of all patterns: entropy {entropy:.2f} of at most ln {n_active} = "
            f"{math.log(n_active):.2f} nats (margin of a pattern: {statistics['margin']:.1f} nats); "
            "a larger model.beta, fewer model.n_patterns or objective.energy_weight may help"
        )
    return warnings


def _with_equilibria(model: nn.Module) -> tuple[Decoder, EquilibriumLayer]:
    layer = require_equilibrium(model)
    assert isinstance(model, Decoder)
    return model, layer
