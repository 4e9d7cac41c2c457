r"""The quotient :math:`[\log\cosh(a + \delta w) - \log\cosh a] / \delta`, stable down to :math:`\delta = 0`."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz._once import is_traced

_NODES, _WEIGHTS = ((x + s) / 2 for x, s in zip(np.polynomial.legendre.leggauss(10), (1.0, 0.0), strict=True))
"""Gauss-Legendre on [0, 1]: exact to 1e-16 for the derivative's integrand where ``|x| <= 1``."""


def log_cosh_quotient(a: Tensor, delta: Tensor, w: Tensor) -> Tensor:
    r""":math:`q = [\log\cosh(a + \delta w) - \log\cosh a] / \delta`, and :math:`w \tanh a` at :math:`\delta = 0`.

    Accuracy: the error is below 4 eps ``|w|``, for every delta and every size of ``a`` and :math:`\delta w`; the naive
        form loses all digits as delta shrinks. With :math:`x = \delta w` it is :math:`w` times

        * :math:`\log(1 + 2 \sinh^2(x/2) + \tanh a \sinh x) / x` for :math:`|x| \le 1`,
        * :math:`\log(\sigma(2a) e^x + \sigma(-2a) e^{-x}) / x` beyond, as a sum of logarithms,
        * :math:`\tanh a + \mathrm{sech}^2 a \; x / 2` below :math:`\sqrt{\epsilon}`.

    The first derivatives are as accurate. Second derivatives exist too, those that involve delta lose digits as
    delta shrinks.
    """
    if (
        not torch.is_grad_enabled() and not is_traced()
    ):  # a call of the function costs as much as what it computes
        return _Quotient.forward(a, delta, w)
    return _Quotient.apply(a, delta, w)


class _Quotient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def forward(a: Tensor, delta: Tensor, w: Tensor) -> Tensor:
        return w * _slope_of_log_cosh(a, delta * w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, delta, w = ctx.saved_tensors
        needed, x = ctx.needs_input_grad, delta * w
        d_a = grad * w * _slope_of_tanh(a, x) if needed[0] else None
        d_delta = grad * w.square() * _mean_curvature(a, x) if needed[1] else None
        return d_a, d_delta, grad * torch.tanh(a + x) if needed[2] else None

    @staticmethod
    def jvp(ctx: Any, d_a: Tensor, d_delta: Tensor, d_w: Tensor) -> Tensor:
        a, delta, w = ctx.saved_tensors
        x = delta * w
        by_a, by_delta = w * _slope_of_tanh(a, x), w.square() * _mean_curvature(a, x)
        return d_a * by_a + d_delta * by_delta + d_w * torch.tanh(a + x)


def _slope_of_log_cosh(a: Tensor, x: Tensor) -> Tensor:
    """``[log cosh(a + x) - log cosh a] / x``."""
    t = torch.tanh(a)
    tiny = x.abs() < torch.finfo(x.dtype).eps ** 0.5
    safe = torch.where(tiny, 1, x)
    near = safe.clamp(-1, 1)
    log_near = torch.log1p(2 * (near / 2).sinh().square() + t * near.sinh())
    log_far = torch.logaddexp(F.logsigmoid(2 * a) + safe, F.logsigmoid(-2 * a) - safe)
    slope = torch.where(safe.abs() <= 1, log_near, log_far) / safe
    return torch.where(tiny, t + (1 - t.square()) * x / 2, slope)


def _slope_of_tanh(a: Tensor, x: Tensor) -> Tensor:
    """``[tanh(a + x) - tanh a] / x``: a difference of sigmoids as a product, nothing is subtracted."""
    high, low, size = torch.maximum(a, a + x), torch.minimum(a, a + x), x.abs()
    nothing = size == 0
    drop = -torch.expm1(-2 * size) / torch.where(nothing, 1, size)
    return 2 * (2 * high).sigmoid() * (-2 * low).sigmoid() * torch.where(nothing, 2, drop)


def _mean_curvature(a: Tensor, x: Tensor) -> Tensor:
    r""":math:`\int_0^1 s\,\mathrm{sech}^2(a + s x)\,ds = [x \tanh(a + x) - \log\cosh(a + x) + \log\cosh a] / x^2`,
    the derivative by delta over :math:`w^2`: as the integral for ``|x| <= 1``, where the difference cancels."""
    near, far = x.clamp(-1, 1), torch.where(x.abs() <= 1, 1, x)
    inside = torch.zeros_like(x)
    for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        inside = inside + weight * node * (1 - torch.tanh(a + node * near).square())
    outside = (torch.tanh(a + far) - _slope_of_log_cosh(a, far)) / far
    return torch.where(x.abs() <= 1, inside, outside)
