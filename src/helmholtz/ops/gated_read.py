"""The two-level gated read: logarithm, temperature gate and outer gate."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import compute_dtype


def gated_read(
    mixed: Float[Tensor, "B T H 2 V"],
    beta: Float[Tensor, "H V"],
    inner: Float[Tensor, "B T H V"] | None = None,
    outer: Float[Tensor, "B T H V"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "B T H V"]:
    r"""Free energy from the averages of ``tilt_values``, blended with the mean and scaled.

    .. math:: F = \beta^{-1} \log \overline{e^{\beta v}}, \quad \lambda = \sigma(\text{inner}), \quad
              u = \mathrm{softplus}(\text{outer}) + \epsilon, \quad
              y = ((1 - \lambda) \bar v + \lambda F) \, \frac{u}{\mathrm{rms}_V(u)}

    A row that saw nothing (average 0 of a positive signal) reads 0 with gradient 0: its logarithm is never taken.

    Args:
        inner: gate logits; None reads ``F`` itself.
        outer: gate pre-activations; None leaves the read unscaled. The gate is positive, with mean square 1 per head.

    Returns: in the dtype of ``mixed``.
    Cost: the kernel makes one pass forward and one backward.
    Source: Lu & Yang 2026, two-level gated FEM. Reference: ``helmholtz.reference.gated_read``.
    """
    wide = compute_dtype(mixed)
    signals, rates = mixed.to(wide), beta.to(wide)
    inner, outer = (None if x is None else x.to(wide) for x in (inner, outer))
    of = torch.ops.helmholtz.gated_read if kernels.usable(signals, rates, inner, outer) else _plain
    read: Tensor = of(signals, rates, inner, outer, eps)
    return read.to(mixed.dtype)


def _plain(mixed: Tensor, beta: Tensor, inner: Tensor | None, outer: Tensor | None, eps: float) -> Tensor:
    mean, partition = mixed.unbind(-2)
    nothing = partition.amax(-1, keepdim=True) <= 0
    free = partition.masked_fill(nothing, 1).log() / beta
    read = free if inner is None else torch.lerp(mean, free, inner.sigmoid())
    return read if outer is None else read * outer_gate(outer, eps=eps)


def outer_gate(x: Float[Tensor, "*batch V"], *, eps: float = 1e-6) -> Float[Tensor, "*batch V"]:
    """``u / rms(u)`` along the last dimension, ``u = softplus(x) + eps``: positive, with mean square 1."""
    u = F.softplus(x, threshold=40) + eps  # beyond torch's threshold of 20 the softplus is x, e^-20 off
    return F.normalize(u, dim=-1) * x.shape[-1] ** 0.5
