"""How the recurrences compute: in the widest dtype given and at least float32, also under autocast."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among ``tensors``, and at least float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast narrows no matrix product."""
    return torch.autocast(device.type, enabled=False)


def beside_the_graph(function: Callable[..., ResultT], *inputs: Any) -> ResultT:
    """``function(*inputs)``, which a compiler that is tracing calls instead of tracing into it.

    For what writes into views. The decorator ``torch.compiler.disable`` would load the compiler whenever the module is.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*inputs)
    return function(*inputs)
