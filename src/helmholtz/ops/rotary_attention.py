"""Rotary softmax attention from one product's output to the heads' reads side by side."""

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce, is_traced
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.rope import rotate_split, turn

LONGEST = 128
"""Tokens up to which forming the weights is faster on a CPU than a kernel that works in blocks."""


def rotary_attention(
    joint: Float[Tensor, "B T N K"],
    cos: Float[Tensor, "*BT K"],
    sin: Float[Tensor, "*BT K"],
    heads: int,
    groups: int,
    *,
    causal: bool = True,
) -> Float[Tensor, "B T HK"]:
    """``softmax_attention`` of the parts that ``rotate_split`` gives, for whole sequences without pads.

    Args:
        joint: queries, keys and values, ``H + 2 G`` heads side by side.

    Cost: on a CPU, up to ``LONGEST`` tokens in at least float32, it saves the weights (``B H T T``) and each gradient
        is written once, straight to its place in that of ``joint``; differentiable once. Otherwise that of the parts.
    Raises: ValueError if the heads do not add up.
    Reference: ``helmholtz.reference.free_energy.rotary_attention``.
    """
    if joint.shape[2] != heads + 2 * groups:
        raise ValueError(f"joint: wanted {heads} + 2 * {groups} heads, got {joint.shape[2]}")
    if _is_short(joint):
        cos, sin = cos.to(joint.dtype), sin.to(joint.dtype)
        read, _ = _ShortAttention.call(joint, cos, sin, heads, groups, causal)
        return read
    q, k, v = rotate_split(joint, cos, sin, heads, groups)
    return softmax_attention(q, k, v, causal=causal).transpose(1, 2).flatten(2)


def _is_short(joint: Tensor) -> bool:
    wide = joint.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(joint.device.type)
    here = joint.device.type == "cpu" and not is_traced()
    return here and wide and joint.shape[1] <= LONGEST


class _ShortAttention(DifferentiableOnce):
    """Inside, heads come first (``N B T K``), and the queries of a group lie one below the other.

    The second output has no elements: saved, it is the way back to ``joint``, which is not.
    """

    @staticmethod
    def forward(ctx, joint, cos, sin, heads, groups, causal):  # type: ignore[no-untyped-def]
        batch, time, n, width = joint.shape
        rows = joint.new_empty(n, batch, time, width)
        by_head, turned = joint.permute(2, 0, 1, 3), heads + groups
        turn(by_head[:turned], cos, sin, rows[:turned])
        rows[turned:].copy_(by_head[turned:])
        q = _below(rows[:heads], groups)
        k, v = rows[heads:].view(2, groups * batch, time, width)
        hidden = q.new_zeros(1, 1)
        if causal:
            hidden = q.new_full((time, time), -torch.inf).triu_(1).repeat(heads // groups, 1)
        weights = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=width**-0.5).softmax(-1)
        way_back = joint.new_empty(0)
        ctx.save_for_backward(q, k, v, cos, sin, weights, way_back)
        ctx.sizes = batch, time, heads, groups
        read = torch.bmm(weights, v).view(groups, batch, -1, time, width)
        return read.permute(1, 3, 0, 2, 4).reshape(batch, time, -1), way_back

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        q, k, v, cos, sin, weights, _ = ctx.saved_tensors
        batch, time, heads, groups = ctx.sizes
        width, turned, scale = k.shape[-1], heads + groups, k.shape[-1] ** -0.5
        read = _below(grad.view(batch, time, heads, width).permute(2, 0, 1, 3), groups)
        d_rows = grad.new_empty(heads + 2 * groups, batch, time, width)
        d_k, d_v = d_rows[heads:].view(2, groups * batch, time, width)
        d_weights = torch.bmm(read, v.transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(weights.transpose(1, 2), read, out=d_v)
        torch.baddbmm(d_k, d_scores.transpose(1, 2), q, beta=0, alpha=scale, out=d_k)
        d_q = torch.baddbmm(q, d_scores, k, beta=0, alpha=scale)
        d_rows[:heads].view(groups, -1, batch, time, width).copy_(
            d_q.view(groups, batch, -1, time, width).transpose(1, 2)
        )
        out = grad.new_empty(batch, time, len(d_rows), width)
        by_head = out.permute(2, 0, 1, 3)
        turn(d_rows[:turned], cos, -sin, by_head[:turned])
        by_head[turned:].copy_(d_rows[turned:])
        return out, None, None, None, None, None


def _below(heads: Tensor, groups: int) -> Tensor:
    """``H B T K`` as ``G*B, (H/G)*T, K``: no copy where each head has its own keys."""
    n, batch, time, width = heads.shape
    each = n // groups
    return (
        heads.reshape(groups, each, batch, time, width)
        .transpose(1, 2)
        .reshape(groups * batch, each * time, width)
    )
