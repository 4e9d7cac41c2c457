"""How a fast op is compared with its float64 reference, and the shapes and dtypes it is compared on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SHAPES = [(1, 1), (2, 63), (1, 64), (2, 65), (1, 130)]
"""Batch and time around the chunk sizes."""


def assert_matches(name: str, actual: Tensor, expected: Tensor, *, budget: float) -> None:
    """Relative RMS error <= ``budget`` eps of the compute dtype, plus one rounding to a narrower output.

    The compute dtype is float32 or wider, and one rounding costs at most eps / 2. A budget in eps of a
    bfloat16 *output* would also accept an op that accumulates in bfloat16. NaN never passes. Where everything
    expected is 0, everything must be 0.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    wide = torch.promote_types(actual.dtype, torch.float32)
    allowed = budget * torch.finfo(wide).eps
    if actual.dtype != wide:
        allowed += torch.finfo(actual.dtype).eps / 2
    if actual.numel() == 0:
        return
    expected = expected.detach().double()
    error = (actual.detach().double() - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    relative = error / max(scale, 1e-300)
    assert error <= allowed * scale, f"{name}: relative RMS error {relative:.3g}, allowed {allowed:.3g}"


def grads(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(out * cotangent)`` with respect to every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = fn(*inputs)
    total = sum((o.double() * c).sum() for o, c in zip(outputs, cotangents, strict=True))
    return torch.autograd.grad(total, inputs)
