"""What would keep too much for its backward pass is computed again there."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

ResultT = TypeVar("ResultT")


def recomputed(function: Callable[..., ResultT], *inputs: Any, draws: bool = False) -> ResultT:
    """``function(*inputs)``; under transforms of ``torch.func`` and in forward mode, which allow no recomputation, it
    keeps all it needs.

    Args:
        draws: whether torch's global generators may be drawn from, and have to be set back for the recomputation.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or not torch.is_grad_enabled():
        return function(*inputs)
    result: ResultT = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return result
