"""The two-level gated read: logarithm, temperature gate and outer gate in one pass over memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._once import DifferentiableOnce
from helmholtz.ops._compute import compute_dtype

BLOCK_ELEMENTS = 1 << 17
"""Elements per block: a dozen temporaries of this size stay in the cache."""


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

    Returns: in the dtype of ``mixed``. Differentiable once.
    Cost: one pass forward, one backward, which recomputes the temporaries block by block.
    Source: Lu & Yang 2026, two-level gated FEM. Reference: ``helmholtz.reference.gated_read``.
    """
    wide = compute_dtype(mixed)
    return _GatedRead.call(mixed.to(wide), beta.to(wide), inner, outer, eps).to(mixed.dtype)


def outer_gate(x: Float[Tensor, "*batch V"], *, eps: float = 1e-6) -> Float[Tensor, "*batch V"]:
    """``u / rms(u)`` along the last dimension, ``u = softplus(x) + eps``: positive, with mean square 1."""
    return torch.nn.functional.normalize(torch.nn.functional.softplus(x) + eps, dim=-1) * x.shape[-1] ** 0.5


class _GatedRead(DifferentiableOnce):
    @staticmethod
    def forward(ctx, mixed, beta, inner, outer, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(mixed, beta, inner, outer)
        ctx.eps = eps
        out = torch.empty_like(mixed[:, :, :, 0], memory_format=torch.contiguous_format)
        for part in _blocks(out):
            read = _Read(mixed[:, part], beta, _cut(inner, part))
            if outer is None:
                out[:, part] = read.value
            else:
                gate = _Gate(outer[:, part].to(out.dtype), eps)
                torch.mul(read.value, gate.value, out=out[:, part])
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        mixed, beta, inner, outer = ctx.saved_tensors
        d_mixed = torch.empty_like(mixed)
        d_beta = torch.zeros_like(beta)
        d_inner = None if inner is None else torch.empty_like(inner, memory_format=torch.contiguous_format)
        d_outer = None if outer is None else torch.empty_like(outer, memory_format=torch.contiguous_format)
        for part in _blocks(grad):
            g = grad[:, part]
            read = _Read(mixed[:, part], beta, _cut(inner, part))
            if outer is not None and d_outer is not None:
                gate = _Gate(outer[:, part].to(grad.dtype), ctx.eps)
                d_outer[:, part] = gate.backward(g * read.value)
                g = g * gate.value
            d_read, d_logit = read.backward(g, d_mixed[:, part])
            d_beta += d_read
            if d_inner is not None and d_logit is not None:
                d_inner[:, part] = d_logit
        return d_mixed, d_beta, d_inner, d_outer, None


class _Read:
    """``(1 - lambda) mean + lambda F`` of one block, keeping what its gradient needs.

    The two averages are interleaved in short runs: each is copied once, so that every later pass is
    contiguous and works in place.
    """

    def __init__(self, mixed: Tensor, beta: Tensor, inner: Tensor | None) -> None:
        mean, partition = (x.clone(memory_format=torch.contiguous_format) for x in mixed.unbind(-2))
        seen_nothing = (partition.amax(-1, keepdim=True) <= 0).to(partition.dtype)  # a whole row at once
        self.beta, self.seen = beta, 1 - seen_nothing
        self.partition = partition.add_(seen_nothing)
        self.free = self.value = self.partition.log().div_(beta)
        self.gate = self.gap = None
        if inner is not None:
            self.gate = inner.to(mixed.dtype).sigmoid()
            self.gap = self.free - mean
            self.value = mean.addcmul_(self.gate, self.gap)

    def backward(self, grad: Tensor, d_mixed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the gradient of the averages; return those of beta and of the gate's logits."""
        d_mean, d_partition = d_mixed.unbind(-2)
        d_logit, d_free = None, grad
        if self.gate is None or self.gap is None:
            d_mean.zero_()
        else:
            d_free = grad * self.gate
            d_mean.copy_(grad - d_free)
            d_logit = self.gate.neg_().add_(1).mul_(d_free).mul_(self.gap)
        scaled = d_free / self.beta
        d_partition.copy_(self.partition.reciprocal_().mul_(scaled).mul_(self.seen))
        return scaled.mul_(self.free).sum((0, 1)).neg_(), d_logit


class _Gate:
    """``u / rms(u)`` with ``u = softplus(x) + eps`` of one block."""

    def __init__(self, raw: Tensor, eps: float) -> None:
        self.raw = raw
        u = torch.nn.functional.softplus(raw).add_(eps)
        self.scale = u.square().mean(-1, keepdim=True).rsqrt_()
        self.value = u.mul_(self.scale)

    def backward(self, grad: Tensor) -> Tensor:
        along = (grad * self.value).mean(-1, keepdim=True)
        return torch.addcmul(grad, self.value, along, value=-1).mul_(self.scale).mul_(self.raw.sigmoid())


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[:, part]


def _blocks(x: Tensor) -> list[slice]:
    """Spans of time whose elements fit a block."""
    time = x.shape[1]
    length = max(1, BLOCK_ELEMENTS * time // max(1, x.numel()))
    return [slice(start, start + length) for start in range(0, time, length)]
