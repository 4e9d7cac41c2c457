"""What a latent code is used for: nats per bit, codes in use, and what the code says about its token."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from helmholtz._checks import check
from helmholtz.ops.binary_latent import MAX_LATENT_BITS, kl_per_bit

ACTIVE = 0.01
"""Nats per token above which a bit is in use."""
CHUNK_TOKENS = 1 << 13
"""Tokens whose code probabilities are held at a time: 33 MB at 16 bits."""


@dataclass(frozen=True, slots=True)
class CodeUsage:
    """How many tokens use a code of ``H`` bits. Divergences are from the uniform code, in nats per token."""

    kl_per_bit: tuple[float, ...]
    """Mean KL of each bit, the lowest first."""
    active_bits: int
    """Bits whose mean KL is above 0.01."""
    codes_used: int
    """Distinct codes among those sampled."""
    perplexity: float
    """Exponential of the entropy of the sampled codes' histogram: 1 to ``codes_used``."""
    mutual_information: float
    """What the code says about which token it belongs to: ``kl`` less the KL of the mean distribution."""
    kl: float
    """Mean KL: the sum of ``kl_per_bit``."""


@torch.no_grad()
def code_usage(
    logits: Float[Tensor, "*batch H"],
    code: Shaped[Tensor, "..."],
    mask: Shaped[Tensor, "..."] | None = None,
) -> CodeUsage:
    r"""Usage of the code by ``N`` tokens whose bits have the given logits and whose sampled codes are ``code``.

    With :math:`G_t` the distribution of token ``t`` over all :math:`2^H` codes,

    .. math:: I = \frac1N \sum_t \mathrm{KL}(G_t \,\|\, U) - \mathrm{KL}\Big(\frac1N \sum_t G_t \,\Big\|\, U\Big),
              \quad 0 \le I \le \min(\ln N, H \ln 2)

    so an ``I`` near :math:`\ln N` says that the tokens are too few to measure it. The histogram's perplexity is at most
    ``N`` likewise.

    Args:
        code: of the shape ``*batch``.
        mask: likewise; where False, the token is a pad and is not counted.

    Accuracy: float64; ``I`` is at least 0 up to rounding.
    Cost: ``2**H`` multiplications per token. The mean distribution is the product of the matrices of the low and the
        high bits' distributions: no tensor has tokens times codes elements.
    Raises: ValueError if no token is counted, shapes do not fit, ``H`` is not in 1..16, or a code is not an integer in
        ``[0, 2**H)``.
    Source: Hoffman & Johnson, "ELBO surgery", 2016 (mutual information). Reference: ``helmholtz.reference.code_usage``.
    """
    wide, codes = _counted(logits, code, mask)
    per_bit = kl_per_bit(wide).mean(0)
    kl = per_bit.sum().item()
    mean = _mean_distribution(wide)
    marginal = wide.shape[1] * math.log(2) + torch.special.xlogy(mean, mean).sum().item()
    counts = codes.unique(return_counts=True)[1].double()
    return CodeUsage(
        kl_per_bit=tuple(per_bit.tolist()),
        active_bits=int((per_bit > ACTIVE).sum()),
        codes_used=len(counts),
        perplexity=torch.special.entr(counts / counts.sum()).sum().exp().item(),
        mutual_information=kl - marginal,
        kl=kl,
    )


def code_probabilities(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch C"]:
    r"""Probability :math:`\prod_h \sigma(L_h)^{U_h(d)} \sigma(-L_h)^{1 - U_h(d)}` of each code ``d`` of ``2**H``.

    Accuracy: factors are multiplied, never subtracted: small probabilities keep their digits.
    Cost: ``2**H`` numbers per token.
    """
    joint = logits.new_ones(*logits.shape[:-1], 1)
    for bit in logits.unbind(-1):
        joint = torch.cat(
            [joint * (-bit).sigmoid().unsqueeze(-1), joint * bit.sigmoid().unsqueeze(-1)], dim=-1
        )
    return joint


def _mean_distribution(logits: Float[Tensor, "N H"]) -> Float[Tensor, "high low"]:
    n_low = logits.shape[1] // 2
    total = logits.new_zeros(())
    for here in logits.split(CHUNK_TOKENS):
        total = total + code_probabilities(here[:, n_low:]).T @ code_probabilities(here[:, :n_low])
    return total / len(logits)


def _counted(logits: Tensor, code: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (in float64) and codes of the tokens that count."""
    shape, n_bits = tuple(logits.shape[:-1]), logits.shape[-1]
    check(1 <= n_bits <= MAX_LATENT_BITS, "logits.shape[-1]", n_bits, f"in 1..{MAX_LATENT_BITS}")
    check(tuple(code.shape) == shape, "code", tuple(code.shape), f"of shape {shape} as the logits")
    integer = not (code.is_floating_point() or code.is_complex() or code.dtype == torch.bool)
    check(integer, "code", code.dtype, "of an integer dtype")
    if mask is not None:
        check(mask.dtype == torch.bool, "mask", mask.dtype, "of dtype torch.bool")
        check(tuple(mask.shape) == shape, "mask", tuple(mask.shape), f"of shape {shape} as the code")
        logits, code = logits[mask], code[mask]
    check(code.numel() > 0, "code", "no token that counts", "of at least one token")
    low, high = (int(bound) for bound in code.aminmax())
    check(low >= 0 and high < 1 << n_bits, "code", f"values from {low} to {high}", f"in [0, {1 << n_bits})")
    return logits.reshape(-1, n_bits).double(), code.flatten()
