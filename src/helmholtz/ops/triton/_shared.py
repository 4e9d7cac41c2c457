"""What the kernels share: the GPU they run on, a launch, and functions of single numbers."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """What a launcher chooses blocks by."""

    backend: str
    """``cuda`` or ``hip``."""
    arch: int | str
    """80, 90, ... or ``gfx942``."""

    @property
    def float32_dot(self) -> str:
        """How matrices of float32 are multiplied to float32's accuracy on units that round their inputs."""
        return "tf32x3" if self.backend == "cuda" else "bf16x6"


assumed: Target | None = None
"""Taken for the GPU that is there: where none is, and kernels are compiled or interpreted all the same."""
_found: dict[int, Target] = {}


def target() -> Target:
    """The GPU that the current device is."""
    if assumed is not None:
        return assumed
    device = torch.cuda.current_device()
    if device not in _found:
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is None:
            _found[device] = Target("cuda", 10 * properties.major + properties.minor)
        else:
            _found[device] = Target("hip", properties.gcnArchName.partition(":")[0])
    return _found[device]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](...)``, and nothing where there is nothing to do: a GPU takes no empty grid."""
    if all(grid):
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of 2 that is at least ``n`` and ``least``, as blocks are."""
    return max(least, triton.next_power_of_2(n))


def with_whole_rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension side by side in memory, whatever the others are."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Its relative error is float32's also where the exponential is small: the rounding of 1 + e is divided out."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    rounded = u - 1.0
    small = rounded == 0.0
    return tl.maximum(x, 0.0) + tl.where(small, e, tl.log(u) * (e / tl.where(small, 1.0, rounded)))


@triton.jit
def places(rows, steps, stride_b, stride_t, stride_h, head, columns):
    """Offsets of the rows (batch and step) of one head: rows x columns."""
    row = rows.to(tl.int64)
    return (row // steps * stride_b + row % steps * stride_t + head * stride_h)[:, None] + columns[None, :]


@triton.jit
def clipped(x, cap):
    """Into [-cap, cap]; NaN stays."""
    return tl.where(x > cap, cap, tl.where(x < -cap, -cap, x))
