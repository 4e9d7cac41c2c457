"""How the recurrences compute: in the widest dtype given and at least float32, also under autocast."""

from functools import reduce

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among ``tensors``, and at least float32."""
    return reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast narrows no matrix product."""
    return torch.autocast(device.type, enabled=False)
