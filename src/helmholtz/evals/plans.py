"""What samples share under one plan, and under a plan each."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.evals.plan_file import set_bit
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.models.generation import PlannedRow, Stream, generate_planned
from helmholtz.models.planning import PlanSettings
from helmholtz.models.sampling import SamplingSettings, check_prompts

Codes = tuple[int, ...]
Group = tuple[PlannedRow, ...]
ENDED = -1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of ``n`` independent values, and its standard error."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the samples of a group have in common, over all pairs of them; standard errors over the groups."""

    agreement: Estimate
    """Part of the positions at which two samples have the same token; where one has ended they differ."""
    common_run: Estimate
    """The longest run of tokens that both samples hold, wherever, as a part of the longer one."""
    curve: tuple[float, ...]
    """Agreement at each new token, over the pairs of which one has not ended."""


@dataclass(frozen=True, slots=True)
class PlanComparison:
    """Groups of samples of one prompt. Group ``g`` of both kinds has the same seeds of its tokens."""

    plans: tuple[Codes, ...]
    """Of each shared group, the codes of the prompt and of all new tokens it may have."""
    shared: tuple[Group, ...]
    """Each group under one plan, the prompt's codes included."""
    independent: tuple[Group, ...]
    """Each sample under a plan of its own."""
    sharing: Sharing
    independent_sharing: Sharing
    gap: Estimate
    """Agreement under a shared plan less that under independent plans, paired by group."""


def draw_plans(
    model: Decoder,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: PlanSettings | None = None,
    *,
    n_plans: int,
) -> tuple[Codes, ...]:
    """Plans of the prompt and of ``max_new_tokens`` more, drawn as ``generate_planned`` draws those of its rows.

    Args:
        plan: its given codes, one row at most, are part of every plan.

    Raises: ValueError as ``generate_planned``, or for more rows of given codes.
    """
    check_prompts(model, [prompt], settings)
    plan = plan or PlanSettings()
    given = plan.codes or ((),)
    check(len(given) == 1, "codes", f"{len(given)} rows", "one row: that of all plans")
    plan = replace(plan, codes=given * n_plans)
    require_plan(model)
    stream = Stream(model, [len(prompt)] * n_plans, settings, plan)
    assert stream.codes is not None
    codes = stream.codes.codes
    with evaluation_mode(model), torch.inference_mode():
        stream.prefill(torch.tensor([list(prompt)] * n_plans, device=codes.device), None)
    return tuple(tuple(row) for row in codes.tolist())


def sample_under(
    model: Decoder, prompt: Sequence[int], settings: SamplingSettings, plans: Sequence[Codes]
) -> Group:
    """One continuation of the prompt per plan; row ``r`` draws its tokens from ``seed + r``."""
    given = PlanSettings(prompt="prior", codes=tuple(plans))  # nothing is left to the encoder
    return tuple(generate_planned(model, [prompt] * len(plans), settings, given))


def compare_plans(
    model: Decoder,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: PlanSettings | None = None,
    *,
    n_samples: int = 5,
    n_plans: int = 8,
) -> PlanComparison:
    """Sample ``n_plans`` groups of ``n_samples`` under a plan per group, and as many under a plan per sample.

    Args:
        plan: its given codes (one row at most) are part of the shared plans alone; its held bits hold in all.

    Cost: ``2 n_plans n_samples`` continuations, half of them at a time.
    Raises: ValueError as ``generate_planned``, for fewer than 2 samples or plans, or more rows of given codes.
    """
    check_integer("n_samples", n_samples, minimum=2)
    check_integer("n_plans", n_plans, minimum=2)
    plan = plan or PlanSettings()
    plans = draw_plans(model, prompt, settings, plan, n_plans=n_plans)
    seed = (settings.seed if plan.seed is None else plan.seed) + n_plans  # row r draws from seed + r
    own = replace(plan, codes=None, seed=seed)
    own_plans = draw_plans(model, prompt, settings, own, n_plans=n_plans * n_samples)
    repeated = [codes for codes in plans for _ in range(n_samples)]
    shared = _groups(sample_under(model, prompt, settings, repeated), n_samples)
    independent = _groups(sample_under(model, prompt, settings, own_plans), n_samples)
    gaps = [agreement(a) - agreement(b) for a, b in zip(shared, independent, strict=True)]
    return PlanComparison(plans, shared, independent, sharing(shared), sharing(independent), estimate(gaps))


def bit_effects(
    model: Decoder,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: PlanSettings | None = None,
    *,
    n_samples: int = 8,
) -> tuple[Estimate, ...]:
    """For each bit, the part of the tokens that differ between a text with it 0 in all codes and one with it 1.

    The two have the same other bits and the same seeds of their tokens: where a bit has no effect this is 0, not the
    difference between two samples. Standard errors are over the ``n_samples`` pairs, each under a plan of its own.

    Cost: ``2 H n_samples`` continuations, ``n_samples`` at a time.
    Raises: ValueError as ``generate_planned``, or for fewer than 2 samples.
    """
    check_integer("n_samples", n_samples, minimum=2)
    plans = draw_plans(model, prompt, settings, plan, n_plans=n_samples)
    effects = []
    for bit in range(require_plan(model).n_bits):
        off, on = (
            sample_under(
                model, prompt, settings, [tuple(set_bit(c, bit, value) for c in codes) for codes in plans]
            )
            for value in (0, 1)
        )
        effects.append(changed(off, on))
    return tuple(effects)


def changed(before: Group, after: Group) -> Estimate:
    """Part of the positions at which row ``r`` of one group has another token than row ``r`` of the other."""
    pairs = [padded([a.tokens, b.tokens]) for a, b in zip(before, after, strict=True)]
    return estimate([1 - _pair_agreement(pair[:1], pair[1:]).item() for pair in pairs])


def sharing(groups: Sequence[Group]) -> Sharing:
    """What the samples of the same group have in common."""
    tokens = [padded([row.tokens for row in group]) for group in groups]
    longest = max(rows.shape[1] for rows in tokens)
    same, running = torch.zeros(2, longest, dtype=torch.float64)
    for rows in tokens:
        first, second = _pairs(rows)
        same[: rows.shape[1]] += _same(first, second).sum(0)
        running[: rows.shape[1]] += _running(first, second).sum(0)
    return Sharing(
        agreement=estimate([agreement(group) for group in groups]),
        common_run=estimate([_common_run(*_pairs(rows)) for rows in tokens]),
        curve=tuple((same / running).tolist()),
    )


def agreement(group: Group) -> float:
    """Part of the positions at which two samples of the group have the same token, over all pairs."""
    return _pair_agreement(*_pairs(padded([row.tokens for row in group]))).mean().item()


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values, of which there must be two."""
    deviation = statistics.stdev(values)
    return Estimate(statistics.fmean(values), deviation / math.sqrt(len(values)), len(values))


def padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "n T"]:
    """Rows of ids as one tensor, -1 after the end of the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[ENDED] * (longest - len(row))] for row in rows], dtype=torch.long)


def _groups(rows: Group, size: int) -> tuple[Group, ...]:
    return tuple(rows[start : start + size] for start in range(0, len(rows), size))


def _pairs(rows: Int[Tensor, "n T"]) -> tuple[Int[Tensor, "pairs T"], Int[Tensor, "pairs T"]]:
    first, second = zip(*itertools.combinations(range(len(rows)), 2), strict=True)
    return rows[list(first)], rows[list(second)]


def _same(a: Int[Tensor, "pairs T"], b: Int[Tensor, "pairs T"]) -> Bool[Tensor, "pairs T"]:
    return (a == b) & (a != ENDED)


def _running(a: Int[Tensor, "pairs T"], b: Int[Tensor, "pairs T"]) -> Bool[Tensor, "pairs T"]:
    return (a != ENDED) | (b != ENDED)


def _pair_agreement(a: Int[Tensor, "pairs T"], b: Int[Tensor, "pairs T"]) -> Tensor:
    """Two texts that both end at once agree wholly."""
    count = _running(a, b).sum(1)
    return torch.where(count > 0, _same(a, b).sum(1).double() / count.clamp(min=1), 1.0)


def _common_run(a: Int[Tensor, "pairs T"], b: Int[Tensor, "pairs T"]) -> float:
    """Mean over pairs of the longest common run; row ``i`` of the usual table follows from row ``i - 1``."""
    best = torch.zeros(len(a), dtype=torch.long)
    run = torch.zeros_like(b)
    for token in a.unbind(1):
        before = torch.cat([run.new_zeros(len(run), 1), run[:, :-1]], dim=1)
        equal = (b == token.unsqueeze(1)) & (b != ENDED)
        run = torch.where(equal, before + 1, 0)
        best = torch.maximum(best, run.amax(1))
    longer = _running(a, b).sum(1)
    return torch.where(longer > 0, best.double() / longer.clamp(min=1), 1.0).mean().item()
