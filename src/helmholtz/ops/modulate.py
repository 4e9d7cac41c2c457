"""A joint projection scaled channel by channel and taken apart."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels


def modulated_split(
    joint: Float[Tensor, "B T W"], scale: Float[Tensor, "B T W"], widths: Sequence[int]
) -> Sequence[Float[Tensor, "B T _"]]:
    """``joint * (1 + scale)``, split along the last dimension.

    Args:
        widths: of the parts; they sum to W.

    Returns: the parts in the wider dtype of the two; with the kernel each is a tensor of its own, else views of one.
    Accuracy: the kernel computes in at least float32 and rounds once; the plain form rounds each product and sum.
    Cost: one pass over memory forward and one backward, where joining the gradients of the parts would be another.
    Source: Lu & Yang 2026, local conditioning. Reference: ``helmholtz.reference.modulated_split``.
    """
    if joint.dtype != scale.dtype:
        dtype = torch.promote_types(joint.dtype, scale.dtype)
        joint, scale = joint.to(dtype), scale.to(dtype)
    if kernels.usable("modulate", joint, scale):
        parts: Sequence[Tensor] = torch.ops.helmholtz.modulate(joint, scale, widths)
        return parts
    return (joint * (1 + scale)).split(list(widths), dim=-1)
