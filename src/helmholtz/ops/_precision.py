"""The dtype in which exponentials, logarithms and long sums are taken."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: bfloat16 and float16 widen, float64 stays."""
    return torch.promote_types(dtype, torch.float32)
