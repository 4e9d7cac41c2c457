"""The gated feed-forward's element-wise part."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels


def swiglu(gate_up: Float[Tensor, "*batch two_F"]) -> Float[Tensor, "*batch F"]:
    r""":math:`\mathrm{silu}(a) \odot b` of the halves ``a, b`` of the last dimension.

    Cost: the kernel makes one pass forward and one backward, and saves the input. Rows of its gradient never lie whole
        pages apart, which makes the product that follows faster.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6. Reference: ``helmholtz.reference.swiglu``.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: wanted two halves side by side, got shape {tuple(gate_up.shape)}")
    if kernels.usable("swiglu", gate_up) and gate_up.dtype in kernels.STORED:
        return torch.ops.helmholtz.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
