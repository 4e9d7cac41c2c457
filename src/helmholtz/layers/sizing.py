"""Matched parameter budgets: the feed-forward width absorbs what a mixer uses more or less than attention."""

import torch

from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig

TOLERANCE = 0.02
"""Largest relative difference between a matched block and the baseline block."""


def mixer_parameters(config: FreeEnergyMixerConfig) -> int:
    """Parameters of a mixer, counted on one that is built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in FreeEnergyMixer(config).parameters())


def attention_parameters(d_model: int, n_heads: int, n_kv_heads: int) -> int:
    """Parameters of bias-free attention: ``2 D^2`` for queries and output, ``2 D^2 G/H`` for keys and values."""
    return 2 * d_model**2 + 2 * d_model * (d_model // n_heads) * n_kv_heads


def matched_d_ff(mixer: FreeEnergyMixerConfig, *, d_ff: int, multiple_of: int = 4) -> int:
    """Width of the SwiGLU that gives a FEM block the parameters of an attention block with feed-forward width ``d_ff``.

    A SwiGLU holds ``3 D`` parameters per unit of width, so rounding to ``multiple_of`` costs at most
    ``1.5 D multiple_of``: below 0.5 % of a block of about ``12 D^2`` from ``D = 128`` on.

    Raises: ValueError if the mixer alone leaves no room for a feed-forward within 2 % of the budget.
    """
    assert mixer.n_kv_heads is not None
    used = mixer_parameters(mixer)
    budget = attention_parameters(mixer.d_model, mixer.n_heads, mixer.n_kv_heads) + 3 * mixer.d_model * d_ff
    unit = 3 * mixer.d_model * multiple_of
    width = multiple_of * max(1, round((budget - used) / unit))
    total = used + 3 * mixer.d_model * width
    if abs(total - budget) > TOLERANCE * budget:
        raise ValueError(
            f"d_ff: a {mixer.prior} mixer of {used:,} parameters cannot be matched to a block of {budget:,} "
            f"(d_model={mixer.d_model}, d_ff={d_ff}); the nearest has {total:,}: choose a larger d_ff"
        )
    return width
