"""What turns the mean that an attention layer reads into a gated free energy, without changing it at the start."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check_choice, check_divides, check_integer, check_positive
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.masked_free_energy import masked_free_energy

GATES = ("channel", "head")


class FreeEnergyGate(nn.Module):
    r"""Blends the mean of an attention layer with the free energy of the same weights, and scales it.

    .. math:: F = \beta^{-1} \log \sum_i p(i) e^{\beta v_i}, \quad \lambda = \alpha\, \sigma(W x), \quad
              y = e^{W_g x} \odot ((1 - \lambda) \mu + \lambda F)

    ``p`` are the attention weights of the layer, ``mu`` its own mean. At the start :math:`\alpha = 0` and
    :math:`W = W_g = 0`, so that ``y`` is ``mu``, bit for bit. The first step then moves :math:`\alpha` and
    :math:`W_g`; ``W`` and ``log_beta`` have a gradient of 0 (not None) until :math:`\alpha` has left 0.

    ``lambda`` is not bounded: below 0 the read goes beyond the mean, away from the free energy. Attention dropout, if
    any, is in ``mu`` alone: a prior that has lost keys is no distribution. ``F`` saturates where ``|beta v| > cap``.

    Args:
        d_model: width of ``x``.
        n_kv_heads: key/value heads, a divisor of ``n_heads``; None means one per query head.
        gates: one ``alpha`` and one row of ``W`` and ``W_g`` per "channel" of every head, or one per "head".
        beta: inverse temperature at the start, in 1/units of the values; learned per channel as ``log_beta``.
        cap: largest ``|beta v|`` in nats that enters the exponential.

    Cost: the softmax average once more, in at least float32; parameters ``2 H V (D + 1)`` per channel, ``2 H (D + 1)``
        per head, about.
    Source: Lu & Yang, "Free Energy Mixer", ICLR 2026; the start at the mean is ours.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        *,
        n_kv_heads: int | None = None,
        gates: Literal["channel", "head"] = "channel",
        beta: float = 1.0,
        cap: float = 40.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_integer("d_model", d_model)
        check_integer("d_head", d_head)
        check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
        check_choice("gates", gates, GATES)
        check_positive("beta", beta)
        check_positive("cap", cap)
        self.n_heads, self.beta_init, self.cap = n_heads, beta, cap
        width = d_head if gates == "channel" else 1
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(n_heads, width, **where))
        self.log_beta = nn.Parameter(torch.empty(n_kv_heads, d_head, **where))
        self.inner = nn.Linear(d_model, n_heads * width, bias=False, **where)
        self.outer = nn.Linear(d_model, n_heads * width, bias=False, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start, at which the layer is what it was: nothing is random."""
        for zero in (self.alpha, self.inner.weight, self.outer.weight):
            nn.init.zeros_(zero)
        nn.init.constant_(self.log_beta, math.log(self.beta_init))

    @property
    def beta(self) -> Float[Tensor, "G V"]:
        """Inverse temperature, in 1/units of the values."""
        return self.log_beta.to(compute_dtype(self.log_beta)).exp()

    def forward(
        self,
        mean: Float[Tensor, "B T H V"],
        x: Float[Tensor, "B T D"],
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G S K"],
        v: Float[Tensor, "B G S V"],
        *,
        mask: Shaped[Tensor, "..."] | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Float[Tensor, "B T H V"]:
        """The gated read, in the dtype of ``mean``.

        Args:
            mean: what the layer itself has read.
            x: what the gates see: the input of the layer.
            q, k, v, mask, causal, scale: what it has read with, as ``masked_free_energy`` takes them.
        """
        free = masked_free_energy(q, k, v, self.beta, mask=mask, causal=causal, scale=scale, cap=self.cap)
        free, wide = free.transpose(1, 2), free.dtype
        inner, outer = (part(x).unflatten(-1, self.alpha.shape).to(wide) for part in (self.inner, self.outer))
        lam = self.alpha.to(wide) * inner.sigmoid()
        read = mean.to(wide)
        read = read + lam * (free - read)
        return (outer.exp() * read).to(mean.dtype)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, beta_init={self.beta_init}, cap={self.cap}"
