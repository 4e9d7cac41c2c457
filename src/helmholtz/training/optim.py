"""AdamW with decay on matrices only, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from helmholtz.training.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight matrices (embeddings included), decayed, and all else, not decayed.

    A matrix is what a module calls ``weight`` and has two or more dimensions. Temperatures and decay rates may be
    stored as tables, but zero is no neutral value for them. A parameter shared by two modules (tied embeddings) is
    listed once; a frozen one not at all.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.split(".")[-1] == "weight"
            (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
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
