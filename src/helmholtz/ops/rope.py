"""Rotary position embedding as a true rotation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz import kernels
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
    if kernels.usable("rope_table", positions):
        table: tuple[Tensor, Tensor] = torch.ops.helmholtz.rope_table(positions, width, theta)
        return table
    rates = theta ** (torch.arange(0, -width, -2, device=positions.device, dtype=torch.float32) / width)
    angles = positions.unsqueeze(-1) * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """``x`` rotated into ``out``, in one dtype; the table of a ``rope_table`` broadcasts to ``x``."""
    (a, b), (low, high), (first, second) = (y.chunk(2, dim=-1) for y in (x, sin, out))
    torch.mul(x, cos, out=out)
    first.addcmul_(b, low)
    second.addcmul_(a, high)
    return out


def rotate(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "*BT K"], sin: Float[Tensor, "*BT K"]
) -> Float[Tensor, "B H T K"]:
    """Rotate the pairs ``(x_i, x_{i+K/2})`` by the angles of a ``rope_table`` (``T K`` or ``B T K``)."""
    return rotate_heads(x.transpose(1, 2), cos, sin)


def rotate_heads(
    x: Float[Tensor, "B T H K"],
    cos: Float[Tensor, "*BT K"],
    sin: Float[Tensor, "*BT K"],
    *,
    heads_first: bool = True,
) -> Float[Tensor, "B H T K"]:
    """`rotate` of heads that lie side by side; the kernel lays each head's rows together, or each step's heads."""
    _check_table(cos, x)
    if _has_kernel(x, cos):
        wide = compute_dtype(x)
        turned, *_ = torch.ops.helmholtz.rope(x, cos.to(wide), sin.to(wide), x.shape[2], 0, heads_first)
        return turned
    if cos.ndim > 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(x.transpose(1, 2), cos, sin)


def _check_table(cos: Tensor, x: Tensor) -> None:
    if cos.shape[-1] != x.shape[-1]:
        raise ValueError(f"cos: a table for width {cos.shape[-1]} cannot rotate x of width {x.shape[-1]}")


def _has_kernel(x: Tensor, table: Tensor) -> bool:
    return kernels.usable("rope", x, table) and x.dtype in kernels.STORED


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(compute_dtype(x))
    turned = torch.addcmul(wide * cos.to(wide.dtype), wide.roll(x.shape[-1] // 2, -1), sin.to(wide.dtype))
    return turned.to(x.dtype)


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

    Cost: the kernel makes one sweep forward and one backward, which writes all three gradients into one tensor. It
        lays each head's rows together; the plain form's values are a view.
    Raises: ValueError if the heads do not add up, or the table has another width.
    """
    if joint.shape[2] != heads + 2 * groups:
        raise ValueError(f"joint: wanted {heads} + 2 * {groups} heads, got {joint.shape[2]}")
    _check_table(cos, joint)
    if _has_kernel(joint, cos):
        wide = compute_dtype(joint)
        q, k, v = torch.ops.helmholtz.rope(joint, cos.to(wide), sin.to(wide), heads, groups, True)
        return q, k, v
    plain, v = joint.split([heads + groups, groups], dim=2)
    turned = _rotated(plain, cos.unsqueeze(-2), sin.unsqueeze(-2))
    q, k = turned.split([heads, groups], dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
