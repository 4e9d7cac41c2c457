"""The two-level gated read: logarithm, temperature gate and outer gate."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import as_dtype, compute_dtype


def gated_read(
    mixed: Float[Tensor, "B T H N V"],
    beta: Float[Tensor, "H V"] | None,
    inner: Float[Tensor, "B T *HV"] | None = None,
    outer: Float[Tensor, "B T *HV"] | None = None,
    own: Float[Tensor, "B T *own"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "B T H V"]:
    r"""Free energy from the averages of ``tilt_values``, blended with the mean and scaled.

    .. math:: F = \beta^{-1} \log \overline{e^{\beta v}}, \quad \lambda = \sigma(\text{inner}), \quad
              u = \mathrm{softplus}(\text{outer}) + \epsilon, \quad
              y = ((1 - \lambda) \bar v + \lambda F) \, \frac{u}{\mathrm{rms}_V(u)}

    A row that saw nothing (average 0 of a positive signal) reads 0 with gradient 0: its logarithm is never taken.

    Args:
        mixed: averages of the two signals. Gates are ``B T H V``, or ``B T (H V)`` as a projection makes them.
        beta: None reads the mean, the only signal then.
        inner: gate logits; None reads ``F`` itself.
        outer: gate pre-activations; None leaves the read unscaled. The gate is positive, with mean square 1 per head.
        own: pre-activations of a second factor, made as the outer gate, but with ``rms_norm``'s small floor.

    Returns: in the dtype of the gates, or of ``mixed`` if there are none.
    Accuracy: computed in at least float32, one rounding to the dtype.
    Cost: the kernel makes one pass forward and one backward.
    Source: Lu & Yang 2026, two-level gated FEM. Reference: ``helmholtz.reference.gated_read``.
    """
    wide, gates = compute_dtype(mixed), (inner, outer, own)
    dtypes = {x.dtype for x in gates if x is not None}
    stored = torch.bfloat16 if dtypes == {torch.bfloat16} and wide == torch.float32 else wide
    signals, rates = as_dtype(mixed, wide), as_dtype(beta, wide)
    if kernels.usable("gated_read", signals):
        inner, outer, own = as_dtype(inner, stored), as_dtype(outer, stored), as_dtype(own, stored)
        read: Tensor = torch.ops.helmholtz.gated_read(signals, rates, inner, outer, own, eps)
    else:
        heads = (*mixed.shape[:3], mixed.shape[4])
        inner, outer, own = (None if x is None else x.to(wide).reshape(heads) for x in gates)
        read = _plain(signals, rates, inner, outer, own, eps)
    return as_dtype(read, next(iter(dtypes), mixed.dtype))


def _plain(
    mixed: Tensor,
    beta: Tensor | None,
    inner: Tensor | None,
    outer: Tensor | None,
    own: Tensor | None,
    eps: float,
) -> Tensor:
    mean, *rest = mixed.unbind(-2)
    read = mean
    if beta is not None:
        free = F.threshold(rest[0], 0, 1).log() / beta
        read = free if inner is None else torch.addcmul(mean, inner.sigmoid(), free - mean)
    if outer is not None:
        read = read * outer_gate(outer, eps=eps)
    return read if own is None else read * own_gate(own, eps=eps)


def gated(x: Float[Tensor, "B T V"], own: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
    """``x`` times the gate that ``own`` is in ``gated_read``, with eps = 0; in the dtype of the gate."""
    if kernels.usable("gated_read", x):
        return gated_read(x.unflatten(-1, (1, 1, -1)), None, own=own, eps=0.0).squeeze(2)
    wide = compute_dtype(x)
    return (x.to(wide) * own_gate(own.to(wide))).to(own.dtype)


def own_gate(x: Float[Tensor, "*batch V"], *, eps: float = 0.0) -> Float[Tensor, "*batch V"]:
    u = _softplus(x)
    return F.rms_norm(u + eps if eps else u, x.shape[-1:])


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # beyond torch's threshold of 20 the softplus is x, e^-20 off


def outer_gate(x: Float[Tensor, "*batch V"], *, eps: float = 1e-6) -> Float[Tensor, "*batch V"]:
    """``u / rms(u)`` along the last dimension, ``u = softplus(x) + eps``: positive, with mean square 1."""
    u = _softplus(x) + eps
    return u * u.square().mean(-1, keepdim=True) ** -0.5
