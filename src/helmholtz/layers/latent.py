"""Latent plans: the encoder that reads bits from text, and the table of vectors per code."""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz._values import free_to_read
from helmholtz.layers.block import Block
from helmholtz.layers.init import init_normal, init_weight
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.placement import dtype_of
from helmholtz.layers.row_draws import POSTERIOR, PRIOR, drawn_uniform
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.ops.binary_latent import bits_to_code, code_lookup, code_to_bits, sample_bits


@dataclass(frozen=True, slots=True)
class Plan:
    """A latent code per token, and the bit logits it was drawn from: the way of the gradient back to the encoder."""

    code: Int[Tensor, "B T"]
    """Integers in ``[0, 2**H)``; bit ``h`` has the weight ``2**h``."""
    logits: Float[Tensor, "B T H"] | None = None
    """None for codes that come from no encoder: the prior's, or given ones."""

    def _repr_html_(self) -> str:
        """The first row's codes, in as many bits as the logits say or the codes take."""
        from helmholtz._notebook.plan import codes_html

        codes = self.code[0].tolist()
        n_bits = max(codes, default=0).bit_length() if self.logits is None else self.logits.shape[-1]
        return codes_html(codes, max(1, n_bits))

    def given(self, code: Int[Tensor, "B T"], where: Bool[Tensor, "B T"]) -> "Plan":
        """This plan with ``code`` instead ``where`` it is given; from there no gradient reaches the encoder."""
        check(code.shape == self.code.shape, "code", tuple(code.shape), f"of shape {tuple(self.code.shape)}")
        logits = self.logits
        if logits is not None:
            logits = torch.where(where.unsqueeze(-1), logits.detach(), logits)
        return Plan(torch.where(where, code, self.code), logits)


def sample_plan(logits: Float[Tensor, "B T H"], *, generator: torch.Generator | None = None) -> Plan:
    """Independent bits under the encoder's logits; the same in training and evaluation.

    Args:
        generator: None draws by row within ``drawn_by_row``, else from torch's global generator.
    """
    uniform = None if generator is not None else drawn_uniform(POSTERIOR, logits)
    return Plan(bits_to_code(sample_bits(logits, uniform=uniform, generator=generator)), logits)


def sample_code(
    n_latent_bits: int,
    batch_size: int,
    n_tokens: int,
    *,
    device: torch.device,
    generator: torch.Generator | None,
) -> Int[Tensor, "B T"]:
    """Uniform codes, one per token; from a generator on its own device, by row or globally as ``sample_plan``."""
    codes, shape = 2**n_latent_bits, (batch_size, n_tokens)
    if generator is not None:
        return torch.randint(codes, shape, generator=generator, device=generator.device).to(device)
    uniform = drawn_uniform(PRIOR, torch.empty(shape, device=device))
    return torch.randint(codes, shape, device=device) if uniform is None else (uniform * codes).long()


def check_plan(z: Plan, shape: tuple[int, ...], n_latent_bits: int) -> None:
    """ValueError unless there is a code in ``[0, 2**H)`` for each of ``B T`` tokens, and logits of its bits if any."""
    codes = 2**n_latent_bits
    if z.code.shape != shape:
        check(False, "z.code", tuple(z.code.shape), f"of shape {shape} as the tokens")
    integer = not (z.code.is_floating_point() or z.code.is_complex() or z.code.dtype == torch.bool)
    check(integer, "z.code", z.code.dtype, "of an integer dtype")
    if z.code.numel() and free_to_read(z.code):
        low, high = (int(bound) for bound in z.code.aminmax())
        if low < 0 or high >= codes:
            check(False, "z.code", f"values from {low} to {high}", f"in [0, {codes})")
    if z.logits is not None:
        wanted = (*shape, n_latent_bits)
        check(tuple(z.logits.shape) == wanted, "z.logits", tuple(z.logits.shape), f"of shape {wanted}")


@final
class LatentEncoder(nn.Module):
    r"""Bit logits of every token from the whole text, :math:`L = W\,\mathrm{norm}(\mathrm{block}(\zeta, x))`.

    One pre-norm block without a causal mask whose residual stream starts at the learned query ``zeta``, the same for
    all tokens; keys and values come from ``x``. Only the rotary positions of queries and keys tell positions apart.
    Each token's logits depend on all real tokens of its own sequence.

    Args:
        block: a block whose mixer is not causal.

    Source: Fleuret, "The Free Transformer", 2025, algorithm 2, lines 6-8.
    """

    def __init__(self, block: Block[Any], d_model: int, n_latent_bits: int, *, norm_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(d_model))
        init_weight(self.query, d_model)
        self.block = block
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.readout = nn.Linear(d_model, n_latent_bits, bias=False)
        init_normal(self.readout)

    def forward(self, x: Float[Tensor, "B T D"], layout: SequenceLayout) -> Float[Tensor, "B T H"]:
        query = self.query.to(x.dtype).view(1, 1, -1)
        read = self.block(query, source=x, layout=layout)
        logits = self.readout(self.norm(read))
        return logits if layout.mask is None else logits.masked_fill(~layout.mask.unsqueeze(-1), 0)


@final
class TablePostSampler(nn.Module):
    """A vector per code, ``2**H x D``; the bits' gradient is exact over all codes (``ops.code_lookup``).

    Source: Fleuret 2025, eq. 6-8 and algorithm 2, line 11.
    """

    def __init__(self, n_latent_bits: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2**n_latent_bits, d_model))
        init_weight(self.weight, d_model)

    def forward(self, plan: Plan | Float[Tensor, "B T C"]) -> Float[Tensor, "B T D"]:
        """Of a plan, or of one-hot vectors with the gradient that they carry."""
        if isinstance(plan, Tensor):
            return plan @ self.weight
        if plan.logits is None:
            return F.embedding(plan.code.long(), self.weight)
        return code_lookup(self.weight, plan.code, plan.logits)


@final
class BitsPostSampler(nn.Module):
    r"""A vector per bit, ``H x D``: :math:`r = W (2 b - 1)`, where :math:`b` passes its gradient on as
    :math:`\sigma(L)`.

    Bits add up here, where the table knows every combination; in return it is ``2**H / H`` times smaller.
    """

    def __init__(self, n_latent_bits: int, d_model: int) -> None:
        super().__init__()
        self.n_latent_bits = n_latent_bits
        self.proj = nn.Linear(n_latent_bits, d_model, bias=False)
        init_weight(self.proj.weight, n_latent_bits * d_model)  # the sum over the bits is as a code's vector

    def forward(self, plan: Plan) -> Float[Tensor, "B T D"]:
        bits = code_to_bits(plan.code, self.n_latent_bits).to(dtype_of(self.proj))
        if plan.logits is not None:
            p = plan.logits.to(bits.dtype).sigmoid()
            bits = bits + (p - p.detach())
        return self.proj(2 * bits - 1)
