"""Matched parameter budgets: the feed-forwards take up what the rest of a model uses more or less than another's."""

from collections.abc import Callable

import torch
from torch import nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.mlp import SwiGLU

TOLERANCE = 0.02
"""Largest excess over a budget, relative to it, where the smallest size is already too large."""


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, a shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def matched_size(
    build: Callable[[int], nn.Module], target: int, *, multiple_of: int = 1, name: str = "d_ff"
) -> int:
    """The size with which the module that ``build`` makes of it has the number of parameters nearest to ``target``.

    Parameters must grow linearly with the size, as with the width of a feed-forward. They are counted on two modules
    without memory.

    Args:
        multiple_of: the size is a multiple of this, and not 0.
        name: of the size in messages.

    Raises: ValueError if the rest leaves no room: with the smallest size it is more than 2 % above the target.
    """
    with torch.device("meta"):
        one, two = (count_parameters(build(n * multiple_of)) for n in (1, 2))
    per_step, rest = two - one, 2 * one - two
    steps = max(1, round((target - rest) / per_step))
    if steps == 1 and one > (1 + TOLERANCE) * target:
        raise ValueError(
            f"{name}: {target:,} parameters cannot be matched, without it there are {rest:,}: narrow the mixers "
            f"(d_head, d_head_v, tdc_width) or set {name} yourself"
        )
    return multiple_of * steps


def matched_d_ff(*mixers: FreeEnergyMixerConfig, d_ff: int, multiple_of: int = 4) -> int:
    """Width of the SwiGLUs that give FEM blocks the parameters of as many attention blocks with feed-forwards ``d_ff``.

    A SwiGLU holds ``3 D`` parameters per unit of width, so rounding to ``multiple_of`` costs at most
    ``1.5 D multiple_of``: below 0.5 % of a block of about ``12 D^2`` from ``D = 128`` on.

    Args:
        mixers: of the blocks; attention has the fewest key/value heads among them.

    Raises: ValueError if the mixers alone leave no room for a feed-forward within 2 % of the budget.
    """
    d_model, n_heads = mixers[0].d_model, mixers[0].n_heads
    n_kv_heads = min(mixer.n_kv_heads or n_heads for mixer in mixers)

    def build(width: int) -> nn.Module:
        return nn.ModuleList([m for c in mixers for m in (FreeEnergyMixer(c), SwiGLU(d_model, width))])

    budget = len(mixers) * attention_block_parameters(d_model, n_heads, n_kv_heads, d_ff)
    return matched_size(build, budget, multiple_of=multiple_of)


def attention_block_parameters(d_model: int, n_heads: int, n_kv_heads: int, d_ff: int) -> int:
    """Parameters of bias-free attention and a SwiGLU: what a block of the baseline holds beside its norms."""
    with torch.device("meta"):
        attention = Attention(d_model, n_heads, n_kv_heads=n_kv_heads)
        return count_parameters(attention) + count_parameters(SwiGLU(d_model, d_ff))
