"""How the recurrences compute: in the widest dtype given and at least float32, also under autocast."""

from typing import overload

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among ``tensors``, and at least float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


@overload
def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def as_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def as_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` in that dtype; a call of ``to`` that changes nothing costs a step of a stream more than the question."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast narrows no matrix product."""
    return torch.autocast(device.type, enabled=False)
