"""The letters study: options, samples, table."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check_choice, check_non_negative
from helmholtz.experiments.base import LIST, Note, Study, add_seeds, make_table
from helmholtz.experiments.letters.data import LetterLaw, letters_to_text, noise_floor, vanilla_floor
from helmholtz.experiments.letters.report import (
    GroupStatistics,
    LetterResult,
    Measured,
    kappa_label,
    law_statistics,
    measure_letters,
    plot_letters,
    sample_letter_groups,
)
from helmholtz.experiments.letters.run import PROFILES, train_on_letters
from helmholtz.experiments.queue import FinishedRun, QueuedRun
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.decoder import Decoder

SHOWN = 5
"""Sequences in each of the three groups that are printed: one with a plan each, two with a plan for all."""
SHOWN_LETTER = 10
DISTRIBUTION = "distribution"
"""The run that measures sequences of the distribution itself."""


class Letters(Study):
    name = "letters"
    actions = {
        "run": "Train models whose free bits per token grow, as in the Free Transformer's paper, and measure their "
        "plans; then the report. Each model's result is kept, and not computed again.",
        "report": "Table and figure of the finished models.",
        "list": LIST,
    }
    reported = ("run", "report")

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        check_choice("profile", values["profile"], PROFILES)
        for kappa in values["kappas"]:
            check_non_negative("kappas", kappa)
        self.experiment = PROFILES[values["profile"]]

    @classmethod
    def output(cls, action: str) -> str:
        return "results/synthetic"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        parser.add_argument(
            "--kappas",
            type=float,
            nargs="+",
            default=[1 / 64, 1 / 8, 1.0, 8.0],
            help="free bits per token, a model for each, beside a decoder without a plan",
        )
        parser.add_argument("--profile", type=str, default="ci", help=f"sizes: {', '.join(PROFILES)}")
        add_seeds(parser, "each gives every model anew", [0])

    def runs(self) -> list[QueuedRun]:
        shared = {"experiment": asdict(self.experiment)}
        return [QueuedRun(DISTRIBUTION, {"law": asdict(self.experiment.law), "seed": 0})] + [
            QueuedRun(
                f"{'vanilla' if kappa is None else kappa}-{seed}",
                shared | {"kappa_bits": kappa, "seed": seed},
            )
            for seed in self.values["seeds"]
            for kappa in (None, *self.values["kappas"])
        ]

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        """Train one model, measure it, and let it write what is printed; or measure the distribution."""
        seed, n_steps, law = run.settings["seed"], self.experiment.steps, self.experiment.law
        if run.name == DISTRIBUTION:
            own = law_statistics(law, generator=torch.Generator().manual_seed(seed))
            return {"vanilla_floor": vanilla_floor(law), "noise_floor": noise_floor(law), "law": asdict(own)}
        model = train_on_letters(
            self.experiment,
            kappa_bits=run.settings["kappa_bits"],
            seed=seed,
            callback=lambda step, loss: note(step, n_steps),
        )
        return {
            "parameters": count_parameters(model),
            "result": measure_letters(model, law, seed=seed).to_dict(),
            "samples": written_samples(model, law, seed),
        }

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        law, models = self.experiment.law, [one for one in done if one.run.name != DISTRIBUTION]
        own = [GroupStatistics(**one.result["law"]) for one in done if one.run.name == DISTRIBUTION]
        if self.action == "run":
            for one in models:
                print_samples(one, console)
        measured = [
            (one.run.settings["kappa_bits"], LetterResult.from_dict(one.result["result"])) for one in models
        ]
        console.print(result_table([one.run.settings["seed"] for one in models], measured, law, own))
        if own and models:
            plot_letters(law, measured, own[0], self.folder / "letters.png")


STUDY = Letters


def written_samples(model: Decoder, law: LetterLaw, seed: int) -> dict[str, list[str]]:
    """Three groups from one prompt: a plan for each sequence, then twice a plan for all of them."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for number, name in enumerate(("a plan each", "one plan", "another plan")):
        shared = number > 0
        tokens = sample_letter_groups(
            model, law, [SHOWN_LETTER], size=SHOWN, shared=shared, generator=generator, seed=seed + number * SHOWN
        )  # fmt: skip
        groups[name] = [letters_to_text(row) for row in tokens[0].tolist()]
    return groups


def print_samples(one: FinishedRun, console: Console) -> None:
    kappa = one.run.settings["kappa_bits"]
    label = f"{'' if kappa is None else 'kappa '}{kappa_label(kappa)}"
    console.print(f"{label}, seed {one.run.settings['seed']}", style="bold")
    for (name, lines), style in zip(one.result["samples"].items(), ("blue", "green", "green"), strict=True):
        console.print(f"  {name}")
        for line in lines:
            console.print(f"    {line}", style=style, markup=False)


def result_table(
    seeds: Sequence[int], measured: Measured, law: LetterLaw, own: Sequence[GroupStatistics]
) -> Table:
    """A row per model, and one for the distribution, whose own sequences measure as ``own``, where that is known."""
    floors = f"floor {vanilla_floor(law):.4f}, noise {noise_floor(law):.4f}"
    rows = [_cells(kappa, seed, result, law) for seed, (kappa, result) in zip(seeds, measured, strict=True)]
    rows += [{"kappa\nbits": "the distribution", **_shared_cells(one, one.valid)} for one in own]
    return make_table(f"Nats per token ({floors}); samples under a shared plan", rows, left=0)


def _cells(kappa_bits: float | None, seed: int, result: LetterResult, law: LetterLaw) -> dict[str, str]:
    b = result.bounds
    return {
        "kappa\nbits": kappa_label(kappa_bits),
        "\nseed": str(seed),
        "posterior\nCE": f"{b.posterior_cross_entropy:.4f}",
        "prior\nCE": f"{b.prior_cross_entropy:.4f}",
        "CE - law\n+ KL": f"{b.excess:.4f}",
        "KL bits\n/token": f"{b.kl_bits:.3f}",
        "KL bits\n/seq.": f"{b.kl_bits * law.n_targets:.1f}",
        **_shared_cells(result.shared, result.independent.valid),
    }


def _shared_cells(shared: GroupStatistics, valid: float) -> dict[str, str]:
    return {
        "\nvalid": f"{valid:.2f}",
        "\nspread": "-" if shared.spread is None else f"{shared.spread:.1f}",
        '"!"\nrepeats': f"{shared.noise_repetition:.2f}",
    }
