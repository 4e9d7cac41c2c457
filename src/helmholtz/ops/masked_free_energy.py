"""The free energy alone, under softmax attention with any mask: for attention layers that already have their mean."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from helmholtz.ops._average import average
from helmholtz.ops._compute import compute_dtype, full_precision


def masked_free_energy(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    beta: Float[Tensor, "G V"],
    *,
    mask: Shaped[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float = 40.0,
) -> Float[Tensor, "B H T V"]:
    r"""Free energy of the values under ``p_t(i) = softmax_i(scale q_t . k_i + mask_ti)``.

    .. math:: F_t = \beta^{-1} \log \sum_i p_t(i)\, e^{\mathrm{clip}(\beta v_i,\, \pm c)}

    A query that sees no key reads 0 with gradient 0.

    Args:
        q, k: queries and keys; ``G`` divides ``H``.
        v: values, in the units of the output.
        beta: inverse temperature per value head and channel, in 1/units of ``v``; positive.
        mask: broadcasts to ``B H T S``. Bool: True where a key is seen. Float: added to the scores, ``-inf`` where it
            is not; a learned one (a bias by distance) gets its gradient, by a path that builds the scores.
        causal: query ``t`` sees the keys up to ``t``; in place of a mask, for ``T = S``.
        scale: of the scores; None is :math:`K^{-1/2}`.
        cap: :math:`c`, the largest :math:`|\beta v|` in nats that enters the exponential.

    Returns: at least float32, whatever the inputs are.
    Accuracy: as ``free_energy_read``, whose free energy this is for a causal prior without a mask.
    Raises: ValueError if heads do not divide, or for ``causal`` with a mask or with ``T != S``.
    Source: Lu & Yang, "Free Energy Mixer", ICLR 2026. Reference: ``helmholtz.reference.masked_free_energy``.
    """
    heads, groups = q.shape[1], k.shape[1]
    if heads % groups:
        raise ValueError(f"k: {groups} key/value heads do not divide {heads} query heads")
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        given = "a mask" if mask is not None else f"{q.shape[2]} queries of {k.shape[2]} keys"
        raise ValueError(f"causal: wanted as many queries as keys and no mask, got {given}")
    wide = compute_dtype(q, v)
    beta, scale = beta.to(wide), q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(wide)
    with full_precision(q.device):
        tilted = (v.to(wide) * beta.unsqueeze(1)).clamp(-cap, cap).exp()
        partition = average(q.to(wide), k.to(wide), tilted, mask=mask, causal=causal, scale=scale)
    seen = torch.where(partition > 0, partition, 1.0)
    return seen.log() / beta.repeat_interleave(heads // groups, dim=0).unsqueeze(1)
