"""Rows and the picture of the study of hybrids."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.hybrids.models import TEXT_MODELS
from helmholtz.experiments.hybrids.run import KAPPAS, LETTER_MIXERS, LETTERS
from helmholtz.experiments.letters.report import LetterResult, kappa_label, law_statistics
from helmholtz.experiments.letters.run import PROFILES
from helmholtz.experiments.queue import FinishedRun, runs_of, spread

Row = dict[str, Any]
Numbers = Mapping[str, float | None]
DIFFERENCES = (
    ("fem", "attention"),
    ("fem_plan", "attention_plan"),
    ("attention_plan", "attention"),
    ("fem_plan", "fem"),
    ("gla", "mamba"),
    ("gla_equilibrium", "mamba_equilibrium"),
    ("mamba_equilibrium", "mamba"),
    ("gla_equilibrium", "gla"),
    ("mamba_equilibrium", "mamba_without"),
    ("gla_equilibrium", "gla_without"),
)
"""Pairs of models of text whose bits per byte are subtracted seed by seed."""


def letter_rows(done: Sequence[FinishedRun]) -> list[Row]:
    """A row per kappa and mixer: bounds, and what samples under one plan share."""
    return [
        {"part": "letters", "model": mixer, "kappa_bits": kappa, **_means(own, letter_numbers)}
        for kappa in KAPPAS
        for mixer in LETTER_MIXERS
        if (own := runs_of(done, part="letters", model=mixer, kappa_bits=kappa))
    ]


def text_rows(done: Sequence[FinishedRun]) -> list[Row]:
    """A row per model of Shakespeare."""
    return [
        {"part": model.part, "model": name, "kind": own[0].result["kind"], **_means(own, text_numbers)}
        for name, model in TEXT_MODELS.items()
        if (own := _of(done, name))
    ]


def difference_rows(done: Sequence[FinishedRun]) -> list[Row]:
    """Bits per byte of one model less those of another, over the seeds that both have."""
    rows = []
    for name, other in DIFFERENCES:
        bits = [
            {run.setting("seed"): run.result["bits_per_byte"] for run in _of(done, model)}
            for model in (name, other)
        ]
        seeds = [seed for seed in bits[0] if seed in bits[1]]
        if seeds:
            gaps = [bits[0][seed] - bits[1][seed] for seed in seeds]
            rows.append({"part": "difference", "model": name, "less": other, "seeds": seeds,
                         "bits_per_byte": asdict(spread(gaps))})  # fmt: skip
    return rows


def letter_numbers(result: Mapping[str, Any]) -> Numbers:
    """The numbers of the letters study's table."""
    found = LetterResult.from_dict(result)
    return {
        "posterior_cross_entropy": found.bounds.posterior_cross_entropy,
        "prior_cross_entropy": found.bounds.prior_cross_entropy,
        "excess": found.bounds.excess,
        "kl_bits": found.bounds.kl_bits,
        "valid": found.independent.valid,
        "start_spread": found.shared.spread,
        "noise_repetition": found.shared.noise_repetition,
    }


def text_numbers(result: Mapping[str, Any]) -> Numbers:
    """Bits per byte, and what is known of plan or equilibria."""
    numbers: dict[str, float | None] = {"bits_per_byte": result["bits_per_byte"]}
    statistics, sharing = result["statistics"], result["sharing"]
    if sharing is not None:
        numbers |= {
            "elbo": result["bounds"]["elbo"],
            "kl_bits": result["bounds"]["kl_bits_per_token"],
            "mutual_information_bits": statistics["mutual_information"] / math.log(2),
            **{f"same_token_{name}": estimate["mean"] for name, estimate in sharing.items()},
        }
    if "mean_steps" in statistics:
        names = ("mean_steps", "max_steps", "converged", "residual", "contraction_bound")
        numbers |= {name: statistics[name] for name in names}
    return numbers


def _of(done: Sequence[FinishedRun], name: str) -> list[FinishedRun]:
    """The runs of a model of text."""
    return runs_of(done, part=TEXT_MODELS[name].part, model=name)


def _means(runs: Sequence[FinishedRun], numbers: Callable[[Mapping[str, Any]], Numbers]) -> Row:
    """Each number as a spread over seeds; None where no run has it."""
    found = [numbers(run.result) for run in runs]
    values = {name: [x for row in found if (x := row[name]) is not None] for name in found[0]}
    seconds = round(sum(run.timing.get("cpu_seconds", 0.0) for run in runs), 1)
    return {
        "seeds": [run.setting("seed") for run in runs],
        "parameters": runs[0].result["parameters"],
        **{name: asdict(spread(own)) if own else None for name, own in values.items()},
        "cpu_seconds": seconds,
    }


def plot_hybrids(done: Sequence[FinishedRun], file: Path) -> None:
    """What samples of letters share under one plan, and the bits per byte of all models of text; dots are seeds."""
    own = law_statistics(PROFILES[LETTERS].law, generator=torch.Generator().manual_seed(0))
    assert own.spread is not None
    with saved_figure(file, (14, 4.4), few_colours=True) as figure:
        starts, noise, bits = figure.subplots(1, 3)
        _draw_letters(starts, done, "start_spread", "spread of the run's start under one plan", own.spread)
        _draw_letters(noise, done, "noise_repetition", "repetition of the noise under one plan", 0.0)
        _draw_bits(bits, done)


def _draw_bits(axes: Any, runs: Sequence[FinishedRun]) -> None:
    names = [name for name in TEXT_MODELS if _of(runs, name)]
    for place, name in enumerate(names):
        values = [run.result["bits_per_byte"] for run in _of(runs, name)]
        axes.plot(values, [place] * len(values), "o", fillstyle="none", color=f"C{place // 2}")
        axes.plot([sum(values) / len(values)], [place], "|", markersize=16, color=f"C{place // 2}")
    axes.set_yticks(range(len(names)), [TEXT_MODELS[name].label for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title("Shakespeare: bits per byte (of plans a bound)", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def _draw_letters(axes: Any, runs: Sequence[FinishedRun], name: str, title: str, law: float) -> None:
    for number, mixer in enumerate(LETTER_MIXERS):
        for place, kappa in enumerate(KAPPAS):
            found = runs_of(runs, part="letters", model=mixer, kappa_bits=kappa)
            values = [y for run in found if (y := letter_numbers(run.result)[name]) is not None]
            label = mixer if place == 0 else None
            places = [place + 0.1 * number] * len(values)
            axes.plot(places, values, "o", fillstyle="none", color=f"C{number}", label=label)
    axes.axhline(law, color="grey", linewidth=0.8, linestyle="--", label="the data distribution itself")
    axes.set_xticks(range(len(KAPPAS)), [kappa_label(kappa) for kappa in KAPPAS])
    axes.set_xlabel("free bits per token")
    axes.set_title(f"letters: {title}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
