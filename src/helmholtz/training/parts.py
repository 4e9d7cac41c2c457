"""What a decoder minimises: cross-entropy, and what its plan and its equilibrium add if it has them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor, nn

from helmholtz.models.base import ModelConfig
from helmholtz.models.decoder import Decoder, require_equilibrium
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.objectives import Objective, Report


@dataclass(frozen=True, kw_only=True)
class HybridObjectiveConfig(FreeBitsConfig, EquilibriumObjectiveConfig):
    """The settings of both, for a model with a plan and an equilibrium."""

    def __post_init__(self) -> None:
        FreeBitsConfig.__post_init__(self)
        EquilibriumObjectiveConfig.__post_init__(self)


ObjectiveConfig = FreeBitsConfig | EquilibriumObjectiveConfig | HybridObjectiveConfig


class HybridObjective:
    """The plan's objective and bound, plus the terms of the equilibria under the plan of the posterior."""

    def __init__(self, plan: FreeBitsObjective, equilibrium: EquilibriumObjective) -> None:
        self.plan, self.equilibrium = plan, equilibrium

    def __call__(self, model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> Objective:
        with self.equilibrium.solving(model, step):
            found, output = self.plan.read(model, tokens, step)
        assert output.equilibrium is not None
        return self.equilibrium.added(model, output.equilibrium, found, step)

    def report(self, model: nn.Module, batches: Sequence[Int[Tensor, "_ _"]], step: int) -> Report:
        """What both say; the equilibria are those under plans of the prior."""
        with self.equilibrium.solving(model, step):
            plan = self.plan.report(model, batches, step)
        other = self.equilibrium.report(model, batches, step)
        return Report(plan.statistics | other.statistics, plan.warnings | other.warnings)


def objective_class(
    model: ModelConfig | type[ModelConfig],
) -> type[FreeBitsConfig] | type[EquilibriumObjectiveConfig] | None:
    """The settings of what a model minimises beside its cross-entropy; None if that is all.

    Of a class of configs: the settings of all parts that its models may have.
    """
    if isinstance(model, type):
        plan = model.plan_config is not ModelConfig.plan_config
        equilibrium = model.equilibrium_config is not ModelConfig.equilibrium_config
    else:
        plan, equilibrium = model.plan_config() is not None, model.equilibrium_config() is not None
    if plan and equilibrium:
        return HybridObjectiveConfig
    if plan:
        return FreeBitsConfig
    return EquilibriumObjectiveConfig if equilibrium else None


def objective_of(
    config: ObjectiveConfig, *, seed: int
) -> FreeBitsObjective | EquilibriumObjective | HybridObjective:
    """The objective of these settings.

    Args:
        seed: of what evaluations draw.
    """
    plan = FreeBitsObjective(config, seed=seed) if isinstance(config, FreeBitsConfig) else None
    if not isinstance(config, EquilibriumObjectiveConfig):
        assert plan is not None
        return plan
    equilibrium = EquilibriumObjective(config, seed=seed)
    return equilibrium if plan is None else HybridObjective(plan, equilibrium)


def lr_factors(config: ObjectiveConfig | None) -> dict[str, float]:
    """By prefix of parameters' names, their learning rate over that of the rest."""
    factors = dict[str, float]()
    if isinstance(config, FreeBitsConfig):
        factors["encoder."] = config.encoder_lr_factor
    if isinstance(config, EquilibriumObjectiveConfig):
        factors["equilibrium.memory."] = config.memory_lr_factor
    return factors


def train_what_is_reached(model: Decoder, config: ObjectiveConfig) -> None:
    """Leave out the start of an equilibrium's search where no term reaches it.

    DDP waits for the gradient of every parameter that is trained.
    """
    if isinstance(config, EquilibriumObjectiveConfig):
        require_equilibrium(model).dynamics.start_proj.requires_grad_(config.convergence_weight > 0)
