"""Blocks that are computed again in the backward pass, as transformers' ``activation_checkpointing_enable`` asks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from helmholtz.layers.block import Block

Checkpoint = Callable[..., Any]
"""``torch.utils.checkpoint.checkpoint`` with its options: calls its first argument with the others."""


def blocks_of(model: nn.Module, every: int) -> list[Block[Any]]:
    """Every ``every``-th block of a model, those of encoders included."""
    return [module for module in model.modules() if isinstance(module, Block)][::every]


def other_switches(model: nn.Module) -> list[nn.Module]:
    """Modules outside of blocks that can compute themselves again: the dynamics of equilibria."""
    inside = {module for block in blocks_of(model, 1) for module in block.modules()}
    return [m for m in model.modules() if m not in inside and hasattr(m, "gradient_checkpointing")]


@contextlib.contextmanager
def checkpointed(blocks: Sequence[Block[Any]], checkpoint: Checkpoint) -> Iterator[None]:
    """While open, calls of these blocks keep their input alone. Hooks stay outside: they run once."""
    for block in blocks:
        block.forward = partial(_call, checkpoint, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _call(checkpoint: Checkpoint, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """All by position: reentrant checkpoints see no gradient of what comes by name."""
    names, n = list(kwargs), len(args)

    def by_position(*values: Any) -> Any:
        return forward(*values[:n], **dict(zip(names, values[n:], strict=True)))

    return checkpoint(by_position, *args, *kwargs.values())
