"""Rotary position embedding as a true rotation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
from helmholtz._once import is_traced
from helmholtz.ops._compute import compute_dtype


def rope_table(
    positions: Int[Tensor, "*BT"], width: int, *, theta: float = 10000.0
) -> tuple[Float[Tensor, "*BT K"], Float[Tensor, "*BT K"]]:
    """``(cos, sin)`` of the angles ``position * theta^(-2i/width)``, in float32 whatever the model's dtype.

    Both halves of a width hold the same angles; the sine's first half is negated, as it meets the pair's other half.

    Accuracy: float32 angles; bfloat16 would merge positions from 256 on.
    Raises: ValueError if ``width`` is odd or ``theta`` is not positive.
    Source: Su et al., "RoFormer", 2021, eq. 15.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width: a rotary head width must be even and at least 2, got {width}")
    if not theta > 0:
        raise ValueError(f"theta: wanted a positive base, got {theta}")
    if kernels.usable(positions):
        table: tuple[Tensor, Tensor] = torch.ops.helmholtz.rope_table(positions, width, theta)
        return table
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.unsqueeze(-1).to(torch.float32) * theta**-exponent
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """``x`` rotated into ``out``, in one dtype; the table of a ``rope_table`` broadcasts to ``x``."""
    (a, b), (low, high), (first, second) = (y.chunk(2, dim=-1) for y in (x, sin, out))
    torch.mul(x, cos, out=out)
    first.addcmul_(b, low)
    second.addcmul_(a, high)
    return out


class _Rotate(torch.autograd.Function):
    """Rotation of the pairs (i, i + K/2); its transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        wide = x.to(cos.dtype)
        return turn(wide, cos, sin, torch.empty_like(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def rotate(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "*BT K"], sin: Float[Tensor, "*BT K"]
) -> Float[Tensor, "B H T K"]:
    """Rotate the pairs ``(x_i, x_{i+K/2})`` by the angles of a ``rope_table`` (``T K`` or ``B T K``)."""
    if cos.shape[-1] != x.shape[-1]:
        raise ValueError(f"cos: a table for width {cos.shape[-1]} cannot rotate x of width {x.shape[-1]}")
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = compute_dtype(x)
    if cos.dtype != wide:
        cos, sin = cos.to(wide), sin.to(wide)
    if x.requires_grad and not is_traced():
        return _Rotate.apply(x, cos, sin)
    y = x.to(wide)
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rope(
    x: Float[Tensor, "B H T K"], positions: Int[Tensor, "*BT"], *, theta: float = 10000.0
) -> Float[Tensor, "B H T K"]:
    """Rotary embedding: logits of rotated queries and keys depend on the difference of positions only.

    Args:
        positions: ``T`` (shared by the batch) or ``B T``; any offset, so that a stream continues where it stopped.

    Accuracy: angles and products in at least float32, one rounding to the dtype of ``x``. Norms are preserved.
    Source: Su et al., 2021, section 3.4.2. Reference: ``helmholtz.reference.rope``.
    """
    return rotate(x, *rope_table(positions, x.shape[-1], theta=theta))


def rotate_split(
    joint: Float[Tensor, "B T N K"],
    cos: Float[Tensor, "*BT K"],
    sin: Float[Tensor, "*BT K"],
    heads: int,
    groups: int,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"], Float[Tensor, "B G T K"]]:
    """Queries and keys, rotated as by ``rotate``, and values, of heads that lie side by side in this order.

    Args:
        joint: ``H + 2 G`` heads, one product's output.

    Cost: one sweep over queries and keys; the values are a view. The backward pass writes all three gradients into one
        tensor, where splitting and rotating apart would join them twice.
    Raises: ValueError if the heads do not add up.
    """
    if joint.shape[2] != heads + 2 * groups:
        raise ValueError(f"joint: wanted {heads} + 2 * {groups} heads, got {joint.shape[2]}")
    cos, sin = cos.unsqueeze(-2).to(compute_dtype(joint)), sin.unsqueeze(-2).to(compute_dtype(joint))
    if joint.requires_grad and not is_traced():
        q, k, v = _RotateSplit.apply(joint, cos, sin, heads, groups)
    else:
        plain, v = joint.split([heads + groups, groups], dim=2)
        wide = plain.to(cos.dtype)
        turned = torch.addcmul(wide * cos, wide.roll(joint.shape[-1] // 2, -1), sin).to(joint.dtype)
        q, k = turned.split([heads, groups], dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _RotateSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, cos, sin, heads, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        plain, v = joint.split([heads + groups, groups], dim=2)
        wide = plain.to(cos.dtype)
        turned = turn(wide, cos, sin, torch.empty_like(wide)).to(joint.dtype)
        q, k = turned.split([heads, groups], dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: with what autograd can follow
            q, k = (_Rotate.apply(grad, cos, -sin) for grad in grads[:2])
            return torch.cat([q, k, grads[2]], dim=2), None, None, None, None
        sizes = [grad.shape[2] for grad in grads]
        out = grads[0].new_empty(*grads[0].shape[:2], sum(sizes), grads[0].shape[-1])
        q, k, v = out.split(sizes, dim=2)
        for grad, into in zip(grads[:2], (q, k), strict=True):
            if grad.dtype == cos.dtype:
                turn(grad, cos, -sin, into)
            else:
                into.copy_(turn(grad.to(cos.dtype), cos, -sin, torch.empty_like(grad, dtype=cos.dtype)))
        v.copy_(grads[2])
        return out, None, None, None, None
