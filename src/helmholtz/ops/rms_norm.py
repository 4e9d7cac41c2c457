"""Division by the root mean square, with a backward pass in few sweeps over memory."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz._once import is_traced
from helmholtz.ops._compute import compute_dtype


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], *, eps: float
) -> Float[Tensor, "*batch D"]:
    r"""Each vector divided by its root mean square, :math:`y = w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    Returns: in the dtype of ``x``; zero goes to zero.
    Accuracy: a few eps of at least float32.
    Cost: forward 3 sweeps over ``x``, backward 6; saves ``x`` and one number per vector. torch's own backward is made
        of some 15 sweeps on a CPU. Differentiable any number of times.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4. Reference:
        ``helmholtz.reference.rms_norm``.
    """
    if torch.is_grad_enabled() and x.dtype == weight.dtype == compute_dtype(x) and not is_traced():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative needs the way from x to its scale
            scale = _inverse_rms(x, ctx.eps)
        product = (grad * x).flatten(0, -2)
        d_weight = product.T @ scale.flatten()
        mean = (product @ weight).view(scale.shape) * scale.square() / -x.shape[-1]
        if torch.is_grad_enabled():
            return torch.addcmul(grad * weight, x, mean) * scale, d_weight, None
        return (grad * weight).addcmul_(x, mean).mul_(scale), d_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square() / x.shape[-1] + eps).rsqrt()
