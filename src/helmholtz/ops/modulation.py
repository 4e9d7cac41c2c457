"""A linear map whose outputs are scaled by low-rank features, in few passes over memory."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce


def modulated_linear(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, "E"] | None,
    features: Float[Tensor, "B T W"],
    scale_weight: Float[Tensor, "E W"],
    widths: list[int],
) -> tuple[Float[Tensor, "B T _"], ...]:
    r""":math:`(W x + b) \odot (1 + S f)`, split along the output into ``widths``.

    Under autocast it computes in autocast's dtype, as a linear map does. Differentiable once.

    Cost: two matrix products and one pass forward, four and two passes backward. The scale, ``W`` wide where the output
        is ``E`` wide, is recomputed in backward; the split costs nothing in either direction.
    """
    assert sum(widths) == weight.shape[0]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, features, scale_weight = (t.to(dtype) for t in (x, weight, features, scale_weight))
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _ModulatedLinear.call(x, weight, bias, features.to(x.dtype), scale_weight, widths)


class _ModulatedLinear(DifferentiableOnce):
    @staticmethod
    def forward(ctx, x, weight, bias, features, scale_weight, widths):  # type: ignore[no-untyped-def]
        rows = x.flatten(0, -2)
        linear = F.linear(rows, weight, bias)
        out = _scale(features.flatten(0, -2), scale_weight).mul_(linear)
        ctx.widths, ctx.has_bias = widths, bias is not None
        ctx.save_for_backward(x, weight, bias, linear, features, scale_weight)
        return out.unflatten(0, x.shape[:-1]).split(widths, dim=-1)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, weight, _, linear, features, scale_weight = ctx.saved_tensors
        rows, flat = x.flatten(0, -2), features.flatten(0, -2)
        to_linear, to_scale = _scale(flat, scale_weight), torch.empty_like(linear)
        parts = zip(*(t.split(ctx.widths, dim=-1) for t in (to_linear, to_scale, linear)), strict=True)
        for grad, (part_linear, part_scale, value) in zip(grads, parts, strict=True):
            grad = grad.flatten(0, -2)
            torch.mul(grad, value, out=part_scale)
            part_linear.mul_(grad)
        shape = features.shape[:-1]
        return (
            (to_linear @ weight).unflatten(0, shape),
            to_linear.T @ rows,
            to_linear.sum(0) if ctx.has_bias else None,
            (to_scale @ scale_weight).unflatten(0, shape),
            to_scale.T @ flat,
            None,
        )


def _scale(features: Tensor, weight: Tensor) -> Tensor:
    """``1 + S f`` by one matrix product: a feature of ones meets a column of ones."""
    return F.linear(F.pad(features, (0, 1), value=1.0), F.pad(weight, (0, 1), value=1.0))
