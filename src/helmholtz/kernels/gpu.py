"""Which operators have a Triton kernel for CUDA tensors (NVIDIA's and AMD's), and how torch finds it.

A module of ``helmholtz.ops.triton`` is imported at the first call of an operator of its own: triton takes a second to
import and need not be there.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from helmholtz.kernels import gradients
from helmholtz.kernels.operators import LIBRARY

MODULES = {
    "causal_conv": "causal_conv",
    "gated_read": "gated_read",
    "linear_attention": "linear_attention",
    "modulate": "modulate",
    "rnn_softmax": "rnn_softmax",
    "scan": "scan",
    "selective_scan": "selective_scan",
    "softmax_read": "softmax_read",
    "tilt": "tilt",
}
"""Of ``helmholtz.ops.triton``, by operator: there ``name`` and ``name_backward`` take what the operators do."""
PRESENT = (torch.version.cuda is not None or torch.version.hip is not None) and find_spec(
    "triton"
) is not None
"""Whether torch is built for a GPU, and triton is there to compile for it."""


def register(key: str = "CUDA", *, with_gradients: bool) -> None:
    """Make the Triton kernels the operators' implementation for tensors of a dispatch key (AMD's GPUs are CUDA to
    torch, too).

    Args:
        with_gradients: from Python, where no compiled library brings them.
    """
    for name, module in MODULES.items():
        for each in (name, f"{name}_backward"):
            if hasattr(torch.ops.helmholtz, each):
                LIBRARY.impl(each, _launcher(each, module), key)
        if with_gradients:
            gradients.register(name)


def _launcher(name: str, module: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"helmholtz.ops.triton.{module}"), name)
        device = next((x.device for x in arguments if isinstance(x, Tensor)), None)
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return found(*arguments)
        with torch.cuda.device(device):  # triton launches on the current one
            return found(*arguments)

    return launch
