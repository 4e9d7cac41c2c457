"""Division by the root mean square."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], *, eps: float
) -> Float[Tensor, "*batch D"]:
    r"""Each vector divided by its root mean square, :math:`y = w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    Returns: in the dtype of ``x``; zero goes to zero.
    Accuracy: a few eps of at least float32, and one rounding to the dtype of ``x``.
    Cost: the kernel reads ``x`` once forward and once backward; it saves ``x`` and one number per vector.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4. Reference:
        ``helmholtz.reference.rms_norm``.
    Raises: ValueError if the weight has another width.
    """
    if weight.shape != (x.shape[-1],):
        raise ValueError(f"weight: wanted {x.shape[-1]} numbers, got shape {tuple(weight.shape)}")
    if kernels.usable("rms_norm", x, weight) and x.dtype in kernels.STORED:
        wide = compute_dtype(x)
        return torch.ops.helmholtz.rms_norm(x, weight if weight.dtype == wide else weight.to(wide), eps)[0]
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
