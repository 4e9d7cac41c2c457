"""Random numbers as a function of a key per row: the same whatever the batch, the device or the number of processes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check

_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def row_keys(seed: int, rows: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """A key per row number under a seed: 64 mixed bits, so that neighbouring seeds and rows share nothing."""
    base = torch.full((1,), seed, dtype=torch.int64, device=rows.device)
    return _mixed(_mixed(base * _INCREMENT) + rows.long() * _INCREMENT)


def row_uniform(
    keys: Int[Tensor, "B"], shape: tuple[int, ...], *, site: int = 0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B ..."]:
    r"""Uniform numbers in :math:`[0, 1)`, of ``shape`` for every row.

    Number ``i`` of a row is a mix of the row's key, the site and ``i`` alone (no generator has a state): rows do not
    depend on their neighbours, and a call can be repeated. Bit-equal on all devices.

    Args:
        site: which of the draws under one key this is; calls of different sites are independent.
        dtype: float32 (24 random bits) or float64 (53 bits).

    Cost: a dozen passes over 8 bytes per number.
    Raises: ValueError for another dtype.
    Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014 (mixing function). Reference:
        ``helmholtz.reference.row_uniform``.
    """
    check(dtype in (torch.float32, torch.float64), "dtype", dtype, "torch.float32 or torch.float64")
    n_bits = 24 if dtype == torch.float32 else 53
    count = torch.Size(shape).numel()
    stream = _mixed(keys + _mixed(torch.full((), site, dtype=torch.int64, device=keys.device)))
    counter = torch.arange(1, count + 1, device=keys.device) * _INCREMENT
    bits = _mixed(stream.unsqueeze(-1) + counter)
    uniform = _shifted(bits, 64 - n_bits).to(dtype).mul_(2.0**-n_bits)
    return uniform.view(len(keys), *shape)


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 64-bit integers in which every input bit changes about half of the output bits."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*shape"], n: int) -> Int[Tensor, "*shape"]:
    """A logical shift to the right: torch's keeps the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)
