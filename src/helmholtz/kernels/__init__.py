"""Kernels: for CPU tensors compiled once against the torch that is installed, for GPUs by triton; used where nothing
transforms a call.

Every operation that has one has a plain form beside it, of torch's own operations: for transforms of ``torch.func``,
second derivatives, export, other devices, and where nothing is built.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_exporting

from helmholtz._checks import check_choice
from helmholtz.kernels import gpu, operators
from helmholtz.kernels.build import load

SWITCH = "HELMHOLTZ_KERNELS"
"""The environment variable that says ``plain`` for plain forms only."""
NAMES = operators.NAMES
STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What tensors may hold of the kernels that also read and write half precision (float16: on a GPU alone)."""
check_choice(SWITCH, os.environ.get(SWITCH, "auto"), ("auto", "plain"))
_plain = os.environ.get(SWITCH) == "plain"
LOADED = not _plain and load()
"""Whether the operators have their implementation in this process: the library was there when it started."""
if gpu.PRESENT and not _plain:
    gpu.register(with_gradients=not LOADED)


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Within this context every operation is made of torch's own, in all threads of the process."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def usable(operator: str, *tensors: Tensor | None) -> bool:
    """Whether a call of ``helmholtz::operator`` on ``tensors`` takes a kernel: there is one for their device and dtypes
    (float16 on the CPU and float64 on a GPU have none), and nothing looks on that follows torch's own operations alone
    (a transform of ``torch.func``, forward mode, an export)."""
    for x in tensors:  # no generator and no call: a step of a stream asks a dozen times a layer
        if x is not None and (not x.is_cpu or x.dtype == torch.float16):
            return gpu.PRESENT and usable_by_triton(operator, tensors)
    plain = _plain or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return LOADED and not plain and not is_exporting()


def usable_by_triton(operator: str, tensors: Iterable[Tensor | None], device: str = "cuda") -> bool:
    """`usable` of tensors that are not all on the CPU; the interpreter takes those that are."""
    if operator not in gpu.MODULES or wants_plain_forms() or is_exporting():
        return False
    return all(x is None or (x.device.type == device and x.dtype != torch.float64) for x in tensors)


def wants_plain_forms() -> bool:
    """Whether they are switched on, or a transform of ``torch.func`` or forward mode looks on: then torch's own fused
    operations, which have one derivative, are avoided as well."""
    return _plain or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refusal() -> str | None:
    """Why no call of this process takes a kernel, or None."""
    if _plain:
        return f"{SWITCH}=plain"
    return (
        None
        if LOADED
        else "they were not built for this torch and processor when this process began: helmholtz kernels build"
    )


__all__ = [
    "LOADED",
    "NAMES",
    "STORED",
    "SWITCH",
    "plain_forms",
    "refusal",
    "usable",
    "usable_by_triton",
    "wants_plain_forms",
]
