"""Where a module computes, and in what."""

import torch
from torch import nn

# Weights may be offloaded (on the meta device until their module is called) or replaced (quantised ones are no
# parameters), so that no single one can be asked.


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter that is in memory; the CPU if there is none."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; torch's default if there is none."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())
