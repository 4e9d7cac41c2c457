"""What a plan holds of a sequence of letters: bounds, and what samples under one plan have in common."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from helmholtz._checks import check_integer
from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.letters.data import (
    MARK,
    N_LETTERS,
    NOISE,
    PROMPT_LENGTH,
    LetterLaw,
    log_likelihood,
    noise_floor,
    possible_starts,
    run_starts,
    sample_letters,
    vanilla_floor,
)
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import SamplingSettings, generate, generate_planned
from helmholtz.models.planning import PlanSettings
from helmholtz.ops.binary_latent import kl_per_token
from helmholtz.ops.losses import cross_entropy

N_SEQUENCES = 8192
BATCH_SIZE = 256
N_GROUPS, GROUP_SIZE = 24, 16
MIN_VALID = 4
"""Valid samples that a group needs for its spread to count."""
EVALUATION_SEED = 1_000_003
"""Added to a model's seed: it is measured on other sequences than it was trained on."""


@dataclass(frozen=True, slots=True)
class LetterBounds:
    """Nats per predicted token on fresh sequences. A model without a plan has KL 0 and one cross-entropy."""

    posterior_cross_entropy: float
    """Under a plan that has seen the sequence: no bound of anything without the KL."""
    prior_cross_entropy: float
    """Under a plan from the prior: an upper bound of the model's own cross-entropy."""
    kl: float
    law: float
    """The distribution's own cross-entropy on these sequences, which no bound can beat but by chance."""
    n_sequences: int

    @property
    def elbo(self) -> float:
        """Posterior cross-entropy and KL: the bound that training minimises, at least that of the distribution."""
        return self.posterior_cross_entropy + self.kl

    @property
    def excess(self) -> float:
        """The ELBO above the distribution's own cross-entropy on the same sequences."""
        return self.elbo - self.law

    @property
    def kl_bits(self) -> float:
        """KL in bits per token."""
        return self.kl / math.log(2)


def letter_bounds(
    model: Decoder, law: LetterLaw, *, generator: torch.Generator, n_sequences: int
) -> LetterBounds:
    """Bounds of a model over ``n_sequences`` fresh sequences, one plan each from the posterior and the prior."""
    sequences = sample_letters(law, n_sequences, generator=generator)
    totals = torch.zeros(3, dtype=torch.float64)
    with evaluation_mode(model):
        for tokens in sequences.split(BATCH_SIZE):
            totals += len(tokens) * torch.tensor(_batch_bounds(model, tokens, generator), dtype=torch.float64)
    posterior, prior, kl = (totals / n_sequences).tolist()
    own = -log_likelihood(law, sequences).mean().item() / law.n_targets
    return LetterBounds(posterior, prior, kl, own, n_sequences)


def _batch_bounds(
    model: Decoder, tokens: Int[Tensor, "B T1"], generator: torch.Generator
) -> tuple[float, float, float]:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if model.plan is None:
        nats = cross_entropy(model(inputs).logits, targets).item()
        return nats, nats, 0.0
    half = model.lower(inputs)
    posterior = model.sample_posterior(half, generator=generator)
    prior = model.sample_prior(*inputs.shape, generator=generator)
    assert posterior.logits is not None
    paid = [cross_entropy(model.upper(half, plan).logits, targets).item() for plan in (posterior, prior)]
    return paid[0], paid[1], kl_per_token(posterior.logits).mean().item()


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What the samples of a group have in common, averaged over groups."""

    valid: float
    """Fraction of samples that are sequences of the distribution."""
    spread: float | None
    """Median absolute deviation of the start of the run among a group's valid samples; None if too few are."""
    noise_repetition: float
    """Correlation of "is noise" between two samples of a group at the same place, beyond that of two groups."""


def group_statistics(law: LetterLaw, tokens: Int[Tensor, "groups size T"]) -> GroupStatistics:
    """Statistics of groups of samples, each group from one prompt.

    Raises: ValueError for fewer than two groups or two samples in each.
    """
    check_integer("groups", tokens.shape[0], minimum=2)
    check_integer("size", tokens.shape[1], minimum=2)
    flat = tokens.flatten(0, 1)
    valid = possible_starts(law, flat).any(1)
    spreads = [_median_deviation(own) for own in run_starts(law, flat).view(tokens.shape[:2])]
    known = [spread for spread in spreads if spread is not None]
    return GroupStatistics(
        valid=valid.double().mean().item(),
        spread=sum(known) / len(known) if known else None,
        noise_repetition=_repetition((tokens[:, :, PROMPT_LENGTH:] == NOISE).double()),
    )


def _median_deviation(starts: Tensor) -> float | None:
    starts = starts[starts.isfinite()]
    if len(starts) < MIN_VALID:
        return None
    return (starts - starts.quantile(0.5)).abs().quantile(0.5).item()


def _repetition(x: Tensor) -> float:
    """Correlation of ``x`` (groups, samples, places) within a group: pairs of one group against pairs of two."""
    groups, size, _ = x.shape
    per_group = x.sum(1)
    total = per_group.sum(0)
    within = ((per_group.square() - per_group).mean(0) / (size * (size - 1))).mean()
    across = (total.square() - per_group.square().sum(0)).mean() / (size**2 * groups * (groups - 1))
    variance = x.mean() - across
    return ((within - across) / variance).item() if variance > 0 else 0.0


def law_statistics(law: LetterLaw, *, generator: torch.Generator) -> GroupStatistics:
    """Statistics of groups of sequences of the distribution itself, which have nothing in common."""
    tokens = sample_letters(law, N_GROUPS * GROUP_SIZE, generator=generator)
    return group_statistics(law, tokens.view(N_GROUPS, GROUP_SIZE, -1))


def sample_letter_groups(
    model: Decoder,
    law: LetterLaw,
    letters: list[int],
    *,
    size: int,
    shared: bool,
    generator: torch.Generator,
    seed: int,
    held: Int[Tensor, "T"] | None = None,
) -> Int[Tensor, "groups size T"]:
    """Sequences that a model writes after a prompt, ``size`` of them for each of ``letters``.

    Args:
        generator: draws the plans; ``seed`` is that of the tokens.
        shared: one plan from the prior per group, the prompt's part included, instead of one per sequence. A model
            without a plan writes the same either way.
        held: the bits that a group shares, a mask for each token; every sequence draws the others. None: all.
    """
    prompts = [[letter, MARK] for letter in letters for _ in range(size)]
    settings = SamplingSettings(max_new_tokens=law.n_characters, seed=seed)
    if model.plan is not None:
        n_plans = len(letters) if shared else len(prompts)
        plans = model.sample_prior(n_plans, law.n_tokens, generator=generator).code
        codes = plans.repeat_interleave(len(prompts) // n_plans, 0)
        if held is not None:
            own = model.sample_prior(len(prompts), law.n_tokens, generator=generator).code
            codes = codes & held | own & ~held
        plan = PlanSettings(codes=tuple(map(tuple, codes.tolist())))
        rows = [row.tokens for row in generate_planned(model, prompts, settings, plan)]
    else:
        rows = generate(model, prompts, settings)
    tokens = torch.tensor([prompt + row for prompt, row in zip(prompts, rows, strict=True)])
    return tokens.view(len(letters), size, law.n_tokens)


@dataclass(frozen=True, slots=True)
class LetterResult:
    """All that is measured of one model."""

    bounds: LetterBounds
    shared: GroupStatistics
    """Of groups whose samples share a plan."""
    independent: GroupStatistics
    """Of groups whose samples have a plan each."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LetterResult":
        groups = {name: GroupStatistics(**values[name]) for name in ("shared", "independent")}
        return cls(LetterBounds(**values["bounds"]), **groups)


def measure_letters(model: Decoder, law: LetterLaw, *, seed: int) -> LetterResult:
    """Bounds over 8192 sequences, and 24 groups of 16 samples under shared and under independent plans."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    bounds = letter_bounds(model, law, generator=generator, n_sequences=N_SEQUENCES)
    letters = torch.randint(N_LETTERS, (N_GROUPS,), generator=generator).tolist()

    def statistics(shared: bool) -> GroupStatistics:
        samples = sample_letter_groups(
            model, law, letters, size=GROUP_SIZE, shared=shared, generator=generator, seed=seed
        )
        return group_statistics(law, samples)

    return LetterResult(bounds, shared=statistics(True), independent=statistics(False))


def kappa_label(kappa_bits: float | None) -> str:
    """``1/64``; ``no plan`` for None."""
    return "no plan" if kappa_bits is None else str(Fraction(kappa_bits).limit_denominator(4096))


Measured = Sequence[tuple[float | None, LetterResult]]
"""Free bits per token (None: no plan) and what came out; several of one kappa differ in their seed."""


def plot_letters(law: LetterLaw, measured: Measured, own: GroupStatistics, file: Path) -> None:
    """What is paid, what the plan carries, and what samples under one plan share, against kappa.

    Dots are models, lines their means.

    Args:
        own: statistics of the distribution's own sequences.
    """
    assert own.spread is not None
    spread, targets = own.spread, law.n_targets
    with saved_figure(file, (13.5, 5)) as figure:
        axes = figure.subplots(1, 3)
        curves: list[tuple[int, str, Callable[[LetterResult], float | None]]] = [
            (0, "under the posterior's plan (leaks)", lambda r: r.bounds.posterior_cross_entropy),
            (0, "under the prior's plan", lambda r: r.bounds.prior_cross_entropy),
            (0, "ELBO", lambda r: r.bounds.elbo),
            (1, "KL of the plan", lambda r: r.bounds.kl_bits * targets or None),
            (
                2,
                "spread of the run's start under one plan, relative to the distribution",
                lambda r: _ratio(r.shared.spread, spread),
            ),
            (2, "repetition of the noise under one plan (correlation)", lambda r: r.shared.noise_repetition),
            (2, "fraction of valid samples under a plan each", lambda r: r.independent.valid),
        ]
        for index, label, value in curves:
            _curve(axes[index], measured, value, label)
        labels, position = _kappas(measured), math.log2(law.n_starts)
        noise = noise_floor(law) * targets / math.log(2)
        for axis, height, text in [
            (0, vanilla_floor(law), "entropy of the distribution"),
            (0, noise_floor(law), "entropy of the noise"),
            (1, position, "position"),
            (1, position + noise, "position and noise"),
        ]:
            axes[axis].axhline(height, color="grey", linewidth=0.8, linestyle="--")
            axes[axis].text(len(labels) - 1, height, text, fontsize=8, color="grey", va="bottom", ha="right")
        titles = ("cross-entropy, nats per token", "bits per sequence", "samples")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, fontsize=11)
            axis.set_xticks(range(len(labels)), [kappa_label(kappa) for kappa in labels])
            axis.set_xlabel("kappa: free bits per token")
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
        axes[0].set_yscale("log")
        axes[1].set_yscale("log")


def _ratio(value: float | None, to: float) -> float | None:
    return None if value is None else value / to


def _kappas(measured: Measured) -> list[float | None]:
    found = {kappa for kappa, _ in measured}
    plain: list[float | None] = [None] if None in found else []
    return plain + sorted(kappa for kappa in found if kappa is not None)


def _curve(axes: Any, measured: Measured, value: Callable[[LetterResult], float | None], label: str) -> None:
    places, numbers, centres, means = [], [], [], []
    for place, kappa in enumerate(_kappas(measured)):
        found = [value(result) for own, result in measured if own == kappa]
        known = [number for number in found if number is not None]
        places += [place] * len(known)
        numbers += known
        if known:
            centres.append(place)
            means.append(statistics.fmean(known))
    (line,) = axes.plot(centres, means, linewidth=1.5, label=label)
    axes.scatter(places, numbers, s=14, color=line.get_color())
