"""Binary latents in float64 by enumeration of every code, as their equations stand."""

import math
from collections import Counter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def bits_to_code(bits: Bool[Tensor, "*batch H"]) -> Int[Tensor, "*batch"]:
    """``sum_h 2^h b_h``."""
    code = torch.zeros(bits.shape[:-1], dtype=torch.long, device=bits.device)
    for h, bit in enumerate(bits.unbind(-1)):
        code = code + 2**h * bit.long()
    return code


def code_to_bits(code: Int[Tensor, "*batch"], n_bits: int) -> Bool[Tensor, "*batch H"]:
    """``b_h = floor(code / 2^h) mod 2``."""
    return torch.stack([code // 2**h % 2 == 1 for h in range(n_bits)], dim=-1)


def code_probabilities(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch C"]:
    """``G_d = exp(sum_h [U_h(d) ln sigma(L_h) + (1 - U_h(d)) ln sigma(-L_h)])`` for each ``d``."""
    logits, n_bits = logits.double(), logits.shape[-1]
    patterns = code_to_bits(torch.arange(2**n_bits, device=logits.device), n_bits)
    on, off = (torch.nn.functional.logsigmoid(x).unsqueeze(-2) for x in (logits, -logits))
    return torch.where(patterns, on, off).sum(-1).exp()


def code_log_probability(
    code: Int[Tensor, "*batch"], logits: Float[Tensor, "*batch H"]
) -> Float[Tensor, "*batch"]:
    """``ln G_d``, picked from the probabilities of all codes."""
    return code_probabilities(logits).gather(-1, code.long().unsqueeze(-1)).squeeze(-1).log()


def code_lookup(
    table: Float[Tensor, "C D"],
    code: Int[Tensor, "*batch"],
    logits: Float[Tensor, "*batch H"] | None = None,
) -> Float[Tensor, "*batch D"]:
    """``(Y + (G - detach(G))) W`` with ``Y`` the one-hot of the code, dense."""
    one_hot = torch.nn.functional.one_hot(code.long(), table.shape[0]).double()
    if logits is not None:
        soft = code_probabilities(logits)
        one_hot = one_hot + (soft - soft.detach())
    return one_hot @ table.double()


def kl_per_bit(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
    """``ln 2 + p ln p + (1 - p) ln (1 - p)``."""
    on, off = logits.double().sigmoid(), (-logits.double()).sigmoid()
    return math.log(2) + torch.special.xlogy(on, on) + torch.special.xlogy(off, off)


def kl_per_token(logits: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch"]:
    """``H ln 2 + sum_d G_d ln G_d`` over all codes."""
    g = code_probabilities(logits)
    return logits.shape[-1] * math.log(2) + torch.special.xlogy(g, g).sum(-1)


def free_bits(
    kl: Float[Tensor, "*batch"], kappa: float, *, mask: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """``sum_t max(0, KL_t - kappa) / T`` over the ``T`` tokens that count."""
    tokens = kl.double().flatten() if mask is None else kl.double()[mask]
    return sum((t - kappa for t in tokens.unbind() if t > kappa), kl.double().sum() * 0) / max(1, len(tokens))


def code_usage(
    logits: Float[Tensor, "*batch H"], code: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None
) -> tuple[tuple[float, ...], int, int, float, float, float]:
    """Mean KL per bit, bits above 0.01, codes, perplexity, ``(1/N) sum_t sum_d G_td ln(G_td / mean_d)``, mean KL."""
    counts = torch.ones_like(code, dtype=torch.bool) if mask is None else mask
    tokens, codes = logits.double()[counts], code[counts].tolist()
    per_bit = tuple(kl_per_bit(tokens).mean(0).tolist())
    g = code_probabilities(tokens)
    information = (torch.special.xlogy(g, g) - torch.special.xlogy(g, g.mean(0))).sum(-1).mean().item()
    shares = [n / len(codes) for n in Counter(codes).values()]
    perplexity = math.exp(-sum(share * math.log(share) for share in shares))
    active = sum(kl > 0.01 for kl in per_bit)
    return per_bit, active, len(shares), perplexity, information, kl_per_token(tokens).mean().item()
