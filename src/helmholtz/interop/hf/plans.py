"""Plans that are functions of a seed and of positions, so that a text read at once or token by token has the same."""

import torch
from torch import Tensor

from helmholtz._checks import check
from helmholtz.interop.hf.config import HelmholtzConfig
from helmholtz.interop.hf.inputs import short
from helmholtz.layers.latent import Plan
from helmholtz.models.decoder import Decoder, PlanOf, require_plan
from helmholtz.models.outputs import LowerOutput
from helmholtz.ops.binary_latent import bits_to_code, sample_bits
from helmholtz.ops.row_random import row_keys, row_uniform

PRIOR, POSTERIOR = 0, 1
"""Sites of the draws: a position's code of the prior says nothing about its code of the encoder."""


def seeded_plan(model: Decoder, seeds: Tensor, *, encoder: bool = False) -> PlanOf:
    """The plan of each row's seed.

    Args:
        seeds: one for all rows or one per row, integer ``1`` or ``B``.
        encoder: the encoder plans, with the seed's uniform numbers; otherwise the prior does.
    """

    def plan(half: LowerOutput) -> Plan:
        positions = half.layout.positions.expand(len(half.x), -1)  # among the real tokens of a row
        if not encoder:
            return Plan(prior_codes(seeds, positions, require_plan(model).n_bits))
        logits = model.posterior(half)
        uniform = _uniform(seeds, positions, logits.shape[-1], POSTERIOR)
        return Plan(bits_to_code(sample_bits(logits, uniform=uniform)))

    return plan


def prior_codes(seeds: Tensor, positions: Tensor, n_bits: int) -> Tensor:
    """A uniform code for each position under its row's seed, ``B T``."""
    return bits_to_code(_uniform(seeds, positions, n_bits, PRIOR) < 0.5)


def plan_seeds(
    config: HelmholtzConfig, plan_seed: int | Tensor | None, tokens: Tensor, *, with_loss: bool
) -> Tensor | None:
    """The argument ``plan_seed`` or the config's, one number or one per row; None of a model without a plan.

    Raises: ValueError for anything else, or where the argument means nothing.
    """
    if config.plan_seed is None:
        wanted = f"None: a {config.architecture} has no plan"
        check(plan_seed is None, "plan_seed", short(plan_seed), wanted)
        return None
    if with_loss:
        check(plan_seed is None, "plan_seed", short(plan_seed), "None with labels: the encoder plans")
    rows = len(tokens)
    seeds = torch.as_tensor(config.plan_seed if plan_seed is None else plan_seed, device=tokens.device)
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
