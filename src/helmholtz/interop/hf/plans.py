"""Plans that are functions of a seed and of positions, so that a text read at once or token by token has the same."""

import torch
from torch import Tensor

from helmholtz._checks import check
from helmholtz.interop.hf.inputs import Inputs
from helmholtz.layers.latent import Plan
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.models.outputs import LMOutput, LMState
from helmholtz.ops.binary_latent import bits_to_code, sample_bits
from helmholtz.ops.row_random import row_keys, row_uniform

PRIOR, POSTERIOR = 0, 1
"""Sites of the draws: a position's code of the prior says nothing about its code of the encoder."""


def read_planned(
    model: Decoder,
    inputs: Inputs,
    state: LMState | None,
    seeds: Tensor,
    *,
    encoder: bool = False,
) -> LMOutput:
    """Logits, and with a state the next one, under the plan of each row's seed.

    Args:
        seeds: one for all rows or one per row, integer ``1`` or ``B``.
        encoder: the encoder plans these tokens, with the seed's uniform numbers; otherwise the prior does.
    """
    half = model.lower(inputs.tokens, state, **inputs.masks())
    positions = layout_positions(half.layout, len(inputs.tokens))
    if not encoder:
        return model.upper(half, Plan(prior_codes(seeds, positions, require_plan(model).n_bits)))
    logits = model.posterior(half)
    uniform = _uniform(seeds, positions, logits.shape[-1], POSTERIOR)
    return model.upper(half, Plan(bits_to_code(sample_bits(logits, uniform=uniform))))


def layout_positions(layout: SequenceLayout, rows: int) -> Tensor:
    """Position of each token among the real tokens of its row, ``B T``."""
    return layout.positions.expand(rows, -1)


def prior_codes(seeds: Tensor, positions: Tensor, n_bits: int) -> Tensor:
    """A uniform code for each position under its row's seed, ``B T``."""
    return bits_to_code(_uniform(seeds, positions, n_bits, PRIOR) < 0.5)


def seeds_of(seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """The argument ``plan_seed`` as a tensor of 1 or ``rows`` numbers. Raises: ValueError for anything else."""
    seeds = torch.as_tensor(seed, device=device)
    integer = not (seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool)
    check(integer, "plan_seed", seeds.dtype, "an integer, or an integer tensor of one per row")
    wanted = f"an integer, or a tensor of shape ({rows},)"
    check(tuple(seeds.shape) in ((), (1,), (rows,)), "plan_seed", tuple(seeds.shape), wanted)
    check(bool((seeds >= 0).all()), "plan_seed", seeds.tolist(), "at least 0")
    return seeds.reshape(-1).long()


def _uniform(seeds: Tensor, positions: Tensor, n_bits: int, site: int) -> Tensor:
    """``B T H`` numbers in [0, 1), each of a row's seed, its token's position and the bit alone."""
    if len(seeds) == 1:
        keys = row_keys(int(seeds), positions.flatten())
        return row_uniform(keys, (n_bits,), site=site).view(*positions.shape, n_bits)
    return torch.cat(
        [_uniform(seeds[r : r + 1], positions[r : r + 1], n_bits, site) for r in range(len(seeds))]
    )
