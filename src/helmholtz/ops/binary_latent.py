"""Binary latents: bits and integer codes, the lookup that passes its gradient to the bits, KL and free bits."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check, check_integer, check_non_negative
from helmholtz._values import free_to_read
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops._recompute import recomputed

MAX_LATENT_BITS = 16
LARGE = 1e3
"""A logit at which the rarer value has probability 0 in float64: stands in for infinity, times which 0 is NaN."""
TILE_BITS = 9
"""Of the codes that the plain form of the lookup works on at once."""


def bits_to_code(bits: Shaped[Tensor, "*batch H"]) -> Int[Tensor, "*batch"]:
    r"""The integer :math:`\sum_h 2^h b_h` of bits given as booleans or as integers 0 and 1.

    Raises: ValueError if the bits are floating point, neither 0 nor 1, or not 1 to 16.
    """
    _check_integers("bits", bits)
    _check_n_bits("bits.shape[-1]", bits.shape[-1])
    _check_range("bits", bits, 2)
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def code_to_bits(code: Shaped[Tensor, "*batch"], n_bits: int) -> Bool[Tensor, "*batch H"]:
    """The bits of every code, the lowest first: the inverse of ``bits_to_code``.

    Raises: ValueError if a code is not an integer in ``[0, 2**n_bits)`` or ``n_bits`` is not in 1..16.
    """
    _check_n_bits("n_bits", n_bits)
    _check_code(code, n_bits)
    return (code.long().unsqueeze(-1) >> torch.arange(n_bits, device=code.device)).bitwise_and(1).bool()


def sample_bits(
    logits: Float[Tensor, "*batch H"],
    *,
    uniform: Float[Tensor, "*batch H"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*batch H"]:
    r"""Independent bits :math:`b_h \sim \mathrm{Bernoulli}(\sigma(L_h))`, compared in at least float32.

    Args:
        uniform: the numbers in [0, 1) that decide; None draws them from ``generator``, which may be torch's own (None).
    """
    wide = logits.detach().to(compute_dtype(logits))
    if uniform is None:
        uniform = torch.rand(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
    return uniform < wide.sigmoid()


def code_log_probability(
    code: Shaped[Tensor, "*batch"], logits: Float[Tensor, "*batch H"]
) -> Float[Tensor, "*batch"]:
    r""":math:`\log G_d = \sum_h \log \sigma(\pm L_h)` of each code ``d``, with + where its bit is on.

    Returns: nats, in at least float32; minus infinity only where a logit is infinite.
    Raises: ValueError if a code is not an integer in ``[0, 2**H)``.
    Source: Fleuret 2025, eq. 8. Reference: ``helmholtz.reference.code_log_probability``.
    """
    wide = logits.to(compute_dtype(logits))
    return F.logsigmoid(torch.where(code_to_bits(code, logits.shape[-1]), wide, -wide)).sum(-1)


def code_lookup(
    table: Float[Tensor, "C D"],
    code: Shaped[Tensor, "*batch"],
    logits: Float[Tensor, "... H"] | None = None,
) -> Float[Tensor, "*batch D"]:
    r"""Row ``code`` of the table, with the exact gradient of its expectation over all :math:`2^H` codes in ``logits``.

    With :math:`G_d = \prod_h \sigma(L_h)^{U_h(d)} \sigma(-L_h)^{1 - U_h(d)}` and :math:`U_h(d)` bit ``h`` of ``d``,

    .. math:: r = W^\top (Y + (G - \mathrm{detach}(G))), \quad
              \frac{\partial \ell}{\partial L_h} = \sum_d G_d\, (U_h(d) - \sigma(L_h))\,
              \Big\langle \frac{\partial \ell}{\partial r}, W_d \Big\rangle, \quad
              \frac{\partial \ell}{\partial W_d} = \sum_{t:\, d_t = d} \frac{\partial \ell}{\partial r_t}

    where :math:`Y` is the one-hot of the code. Neither :math:`Y` nor :math:`G` is ever formed.

    Args:
        code: what was sampled from ``logits``, or any other code: the gradient of the logits does not depend on it.
        logits: None for codes that come from no logits (the prior, a given plan).

    Returns: in the dtype of the table. The plain form's second derivatives are those of the equation as it stands.
    Accuracy: the gradient is computed in at least float32; the factors of ``G`` are multiplied, never subtracted, so
        that it keeps its relative accuracy where a bit is all but certain. The kernel's is so also where the backward
        pass runs under autocast, which narrows the plain form's products there.
    Cost: the kernel gathers forward and takes ``C D`` multiplications per token backward, the plain form that many
        forward and three times as many backward. Tokens times ``2**TILE_BITS`` numbers are held at a time. Saves the
        table, the codes and the logits.
    Raises: ValueError if the table has not ``2**H`` rows for an ``H`` in 1..16, or a code is not an integer in it.
    Source: Fleuret, "The Free Transformer", 2025, eq. 6-8. Reference: ``helmholtz.reference.code_lookup``.
    """
    rows = table.shape[0]
    wanted = f"2**H rows with H in 1..{MAX_LATENT_BITS}"
    check(rows in {1 << n for n in range(1, MAX_LATENT_BITS + 1)}, "table", tuple(table.shape), wanted)
    n_bits = rows.bit_length() - 1
    _check_code(code, n_bits)
    if logits is None:
        return F.embedding(code.long(), table)
    check(logits.shape == (*code.shape, n_bits), "logits", tuple(logits.shape), f"{(*code.shape, n_bits)}")
    if (
        kernels.usable("code_lookup", table, code, logits)
        and table.dtype in kernels.STORED
        and logits.dtype in kernels.STORED
    ):
        found: Tensor = torch.ops.helmholtz.code_lookup(table, code.long(), logits)
        return found
    wide = table.to(compute_dtype(table, logits))
    return (F.embedding(code.long(), wide) + _zero_with_the_gradient(wide, logits)).to(table.dtype)


def _zero_with_the_gradient(table: Tensor, logits: Tensor) -> Float[Tensor, "*batch D"]:
    """``(G - detach(G)) W``, a tile of codes that share their high bits after another."""
    x = logits.to(table.dtype)
    on, off = (
        F.logsigmoid(x).exp(),
        F.logsigmoid(-x).exp(),
    )  # sigmoid's own gradient loses every digit of a small off
    low = _joint(on[..., :TILE_BITS], off[..., :TILE_BITS])
    high = _joint(on[..., TILE_BITS:], off[..., TILE_BITS:])
    tiles = table.unflatten(0, (-1, low.shape[-1]))
    total = logits.new_zeros((), dtype=table.dtype)
    for weight, vectors in zip(high.unbind(-1), tiles.unbind(0), strict=True):
        total = total + recomputed(_zero_of_a_tile, low, weight, vectors)
    return total


def _zero_of_a_tile(low: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    joint = low * weight.unsqueeze(-1)
    with full_precision(low.device):
        return (joint - joint.detach()) @ vectors


def _joint(on: Float[Tensor, "*batch h"], off: Float[Tensor, "*batch h"]) -> Float[Tensor, "*batch codes"]:
    """Probability of each of the ``2**h`` patterns of ``h`` independent bits, the lowest bit first."""
    joint = on.new_ones(*on.shape[:-1], 1)
    for pair in torch.stack([off, on], dim=-1).unbind(-2):
        joint = (pair.unsqueeze(-1) * joint.unsqueeze(-2)).flatten(-2)
    return joint


def kl_per_bit(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
    r"""KL divergence in nats of a bit that is on with probability :math:`\sigma(L)` from a fair one.

    .. math:: \mathrm{KL} = \ln 2 - \mathrm{softplus}(-|L|) - |L|\,\sigma(-|L|)
              = \tfrac12 \big(L t + \ln(1 - t^2)\big), \quad t = \tanh(L / 2)

    The second form is used for ``|L| < 1``, where the first subtracts nearly equal numbers.

    Returns: in at least float32, in ``[0, ln 2]``. Its gradient is :math:`L\,\sigma(L)\,\sigma(-L)`, 0 at infinity.
    Accuracy: a few eps, relative, at every finite or infinite logit whose square does not underflow.
    Source: Fleuret 2025, eq. 4. Reference: ``helmholtz.reference.kl_per_bit``.
    """
    x = logits.to(compute_dtype(logits))
    near, far = x.clamp(-1, 1), x.abs().clamp(1, LARGE)
    tanh = (near / 2).tanh()
    small = (near * tanh + torch.log1p(-tanh.square())) / 2
    large = math.log(2) - F.softplus(-far) - far * (-far).sigmoid()
    return torch.where(x.abs() < 1, small, large)


def kl_per_token(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch"]:
    r"""KL divergence in nats of ``H`` independent bits from the uniform code: the sum of ``kl_per_bit``."""
    return kl_per_bit(logits).sum(-1)


def free_bits(
    kl: Float[Tensor, "*batch"], kappa: float, *, mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, ""]:
    r"""Mean over tokens of :math:`\max(0, \mathrm{KL}_t - \kappa)`: each token's hinge is taken before the mean.

    Args:
        kl: nats per token, as of ``kl_per_token``.
        kappa: what each token may carry at no charge, in nats; ``bits_to_nats`` converts.
        mask: where False, the token is a pad and enters neither the sum nor the count.

    Returns: 0 with gradient 0 where nothing is counted. A token at or below ``kappa`` has gradient 0.
    Raises: ValueError if ``kappa`` is negative or not finite, or the mask has another shape.
    Source: Fleuret 2025, eq. 5; Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016.
    """
    check_non_negative("kappa", kappa)
    excess = F.relu(kl - kappa)
    if mask is None:
        return excess.sum() / max(1, excess.numel())
    check(mask.shape == kl.shape, "mask", tuple(mask.shape), f"of the shape of kl, {tuple(kl.shape)}")
    return excess.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def bits_to_nats(bits: float) -> float:
    """``bits`` times ``ln 2``."""
    return bits * math.log(2)


def _check_n_bits(name: str, n_bits: int) -> None:
    check_integer(name, n_bits)
    check(n_bits <= MAX_LATENT_BITS, name, n_bits, f"at most {MAX_LATENT_BITS}")


def _check_integers(name: str, x: Tensor) -> None:
    check(not (x.is_floating_point() or x.is_complex()), name, x.dtype, "of an integer dtype")


def _check_code(code: Tensor, n_bits: int) -> None:
    _check_integers("code", code)
    check(code.dtype != torch.bool, "code", code.dtype, "of an integer dtype")
    _check_range("code", code, 1 << n_bits)


def _check_range(name: str, x: Tensor, stop: int) -> None:
    if x.numel() and x.dtype != torch.bool and free_to_read(x):
        low, high = (int(bound) for bound in x.aminmax())
        check(low >= 0 and high < stop, name, f"values from {low} to {high}", f"in [0, {stop})")
