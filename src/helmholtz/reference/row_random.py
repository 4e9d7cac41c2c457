"""Random numbers as a function of a key, in Python's integers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = 2**64 - 1


def _splitmix64(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def row_keys(seed: int, rows: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Mix of the mixed seed's multiple plus the row's, both times the golden gamma."""
    gamma = 0x9E3779B97F4A7C15
    base = _splitmix64(seed * gamma)
    return torch.tensor([_signed(_splitmix64(base + row * gamma)) for row in rows.tolist()])


def row_uniform(keys: Int[Tensor, "B"], shape: tuple[int, ...], *, site: int = 0) -> Float[Tensor, "B ..."]:
    """The upper 53 bits of the mix of stream and counter, over 2^53, in float64."""
    gamma, count = 0x9E3779B97F4A7C15, torch.Size(shape).numel()
    rows = []
    for key in keys.tolist():
        stream = _splitmix64(key + _splitmix64(site))
        rows.append([(_splitmix64(stream + i * gamma) >> 11) / 2**53 for i in range(1, count + 1)])
    return torch.tensor(rows, dtype=torch.float64).view(len(keys), *shape)
