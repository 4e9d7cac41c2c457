"""How the recurrences compute: in the widest dtype given and at least float32, also under autocast."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among ``tensors``, and at least float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast narrows no matrix product."""
    return torch.autocast(device.type, enabled=False)
