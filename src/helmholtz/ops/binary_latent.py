"""Binary latents: bits and integer codes, the lookup that passes its gradient to the bits, KL and free bits."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from helmholtz._checks import check, check_integer, check_non_negative
from helmholtz._once import DifferentiableOnce
from helmholtz._values import free_to_read
from helmholtz.ops._compute import compute_dtype, full_precision

MAX_LATENT_BITS = 16
LARGE = 1e3
"""A logit at which the rarer value has probability 0 in float64: stands in for infinity, times which 0 is NaN."""
TILE_CODES = 1 << 9
"""Codes in one tile of the lookup's backward."""
CHUNK_ELEMENTS = 1 << 19
"""Tokens times codes in one tile: 2 MB in float32, so that a core's cache holds what is read twice."""


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

    Returns: in the dtype of the table. Differentiable once.
    Accuracy: the gradient is computed in at least float32 also under autocast; the factors of ``G`` are multiplied,
        never subtracted, so that it keeps its relative accuracy where a bit is all but certain.
    Cost: forward a gather. Backward ``C D`` multiplications per token, in tiles of ``CHUNK_ELEMENTS`` numbers,
        one held at a time. Saves the table, the codes and the logits.
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
    return _CodeLookup.call(table, code.long(), logits)


class _CodeLookup(DifferentiableOnce):
    @staticmethod
    def forward(ctx, table, code, logits):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(table, code, logits)
        return F.embedding(code, table)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        table, code, logits = ctx.saved_tensors
        wide = compute_dtype(table, logits)
        rows = grad.reshape(-1, table.shape[1]).to(wide)
        d_table = d_logits = None
        if ctx.needs_input_grad[0]:
            d_table = rows.new_zeros(table.shape).index_add_(0, code.flatten(), rows).to(table.dtype)
        if ctx.needs_input_grad[2]:
            with full_precision(grad.device):
                flat = logits.reshape(-1, logits.shape[-1]).to(wide)
                d_logits = _gradient_of_logits(table.to(wide), flat, rows).view_as(logits).to(logits.dtype)
        return d_table, None, d_logits


def _gradient_of_logits(table: Tensor, logits: Tensor, grad: Tensor) -> Tensor:
    """Contract ``<grad, W_d> G_d`` over the high bits and over the low bits, a tile of tokens by codes at a time."""
    n_low = logits.shape[1] // 2
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    codes = min(len(table), max(TILE_CODES, 1 << n_low))
    size = max(1, CHUNK_ELEMENTS // codes)
    # one buffer for all tiles: fresh pages cost half as much as the product
    buffer = table.new_empty(min(size, len(logits)) * codes)
    for here, rows, into in zip(logits.split(size), grad.split(size), out.split(size), strict=True):
        on, off = here.sigmoid(), (-here).sigmoid()  # 1 - on would lose every digit of a small off
        low = _joint(on[:, :n_low], off[:, :n_low])
        high = _joint(on[:, n_low:], off[:, n_low:])
        over_high, over_low = torch.zeros_like(low), torch.empty_like(high)
        tile = buffer[: len(rows) * codes].view(len(rows), codes)
        step = codes >> n_low
        parts = zip(table.split(codes), high.split(step, 1), over_low.split(step, 1), strict=True)
        for vectors, weights, summed in parts:
            per_code = torch.mm(rows, vectors.T, out=tile).view(-1, step, low.shape[1])
            per_code.mul_(low.unsqueeze(1))
            over_high.unsqueeze(1).baddbmm_(weights.unsqueeze(1), per_code)
            torch.sum(per_code, 2, out=summed)
        over_low.mul_(high)
        for part, weighted in (slice(0, n_low), over_high), (slice(n_low, None), over_low):
            bits = _all_bits(weighted)
            into[:, part] = off[:, part] * (weighted @ bits) - on[:, part] * (weighted @ (1 - bits))
    return out


def _joint(on: Tensor, off: Tensor) -> Tensor:
    """Probability of each of the ``2**h`` patterns of ``h`` independent bits, the lowest bit first."""
    joint = on.new_ones(on.shape[0], 1)
    for pair in torch.stack([off, on], dim=2).unbind(1):
        joint = (pair.unsqueeze(2) * joint.unsqueeze(1)).flatten(1)
    return joint


def _all_bits(like: Tensor) -> Tensor:
    """The bits of ``0 .. n - 1`` for the last dimension ``n`` of ``like``, in its dtype."""
    n = like.shape[-1]
    codes = torch.arange(n, device=like.device).unsqueeze(1)
    return (codes >> torch.arange(n.bit_length() - 1, device=like.device)).bitwise_and(1).to(like.dtype)


def kl_per_bit(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
    r"""KL divergence in nats of a bit that is on with probability :math:`\sigma(L)` from a fair one.

    .. math:: \mathrm{KL} = \ln 2 - \mathrm{softplus}(-|L|) - |L|\,\sigma(-|L|)
              = \tfrac12 \big(L t + \ln(1 - t^2)\big), \quad t = \tanh(L / 2)

    The second form is used for ``|L| < 1``, where the first subtracts nearly equal numbers.

    Returns: in at least float32, in ``[0, ln 2]``. Its gradient is :math:`L\,\sigma(L)\,\sigma(-L)`, 0 at infinity.
    Accuracy: a few eps, relative, at every finite or infinite logit whose square does not underflow.
    Source: Fleuret 2025, eq. 4. Reference: ``helmholtz.reference.kl_per_bit``.
    """
    return _BitKL.apply(logits.to(compute_dtype(logits)))


class _BitKL(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def forward(logits):  # type: ignore[no-untyped-def]
        size = logits.abs().clamp(max=LARGE)
        tanh = (size / 2).tanh()
        near = (size * tanh + torch.log1p(-tanh.square())) / 2
        far = math.log(2) - F.softplus(-size) - size * (-size).sigmoid()
        return torch.where(size < 1, near, far)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (logits,) = ctx.saved_tensors
        return grad * logits.clamp(-LARGE, LARGE) * logits.sigmoid() * (-logits).sigmoid()

    jvp = backward  # the derivative is a factor per element


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
