"""AdamW with decay on matrices only, and the learning rate as a function of the step."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from helmholtz._checks import check
from helmholtz.training.config import TrainConfig

NO_FACTORS: Mapping[str, float] = MappingProxyType({})


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_factors: Mapping[str, float] = NO_FACTORS
) -> list[dict[str, Any]]:
    """Two groups: weight matrices (embeddings included), decayed, and all else, not decayed; two more per factor.

    A parameter shared by two modules (tied embeddings) is listed once; a frozen one not at all.

    Args:
        lr_factors: by prefix of parameters' names, their learning rate over that of the rest: ``lr_factor`` of a group.

    Raises: ValueError if no trained parameter has such a prefix.
    """
    pairs: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {"": ([], [])}
    pairs |= {prefix: ([], []) for prefix in lr_factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = next((prefix for prefix in lr_factors if name.startswith(prefix)), "")
            pairs[prefix][0 if is_decayed(name, parameter) else 1].append(parameter)
    groups = []
    for prefix, (decayed, kept) in pairs.items():
        check(bool(decayed or kept), "lr_factors", prefix, "the prefix of a trained parameter's name")
        factor = lr_factors.get(prefix, 1.0)
        groups.append({"params": decayed, "weight_decay": weight_decay, "lr_factor": factor})
        groups.append({"params": kept, "weight_decay": 0.0, "lr_factor": factor})
    return groups


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a weight matrix: what a module calls ``weight`` and has two or more dimensions.

    Temperatures and decay rates may be stored as tables, but zero is no neutral value for them.
    """
    return parameter.ndim >= 2 and name.split(".")[-1] == "weight"


def make_optimizer(
    model: nn.Module, config: TrainConfig, lr_factors: Mapping[str, float] = NO_FACTORS
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``. Whoever sets a group's ``lr`` multiplies by its ``lr_factor``."""
    groups = parameter_groups(model, config.weight_decay, lr_factors)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    r"""Learning rate of optimizer step ``step`` (the first is 0).

    Linear over the ``w`` warm-up steps, :math:`\eta (t + 1) / w`, then a half cosine from :math:`\eta` at
    :math:`t = w` to ``min_lr_ratio`` :math:`\eta` at the last step. A function and not an object: there is no
    schedule state to save.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * ratio
