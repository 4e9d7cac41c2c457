"""Part of the demo: a Free Transformer learns to plan where a run of letters stands."""

import math
from dataclasses import asdict
from typing import Any

import torch

from helmholtz.experiments.demo.settings import DemoSettings, Note
from helmholtz.experiments.letters.plan_bits import bit_information, held_spreads
from helmholtz.experiments.letters.report import law_statistics, measure_letters
from helmholtz.experiments.letters.run import train_on_letters
from helmholtz.experiments.letters.study import written_samples

N_SEQUENCES = 4096
TRAINING = 0.75
"""Fraction of the part's time; the rest measures."""


def compute(settings: DemoSettings, note: Note) -> dict[str, Any]:
    """Train one model; what it writes under plans, and which bits of a plan decide the place of the run."""
    experiment, seed = settings.letters, settings.seed
    law = experiment.law

    def follow(step: int, loss: float) -> None:
        words = f"Free Transformer on letters: training, step {step} of {experiment.steps}"
        note(words, TRAINING * step / experiment.steps)

    model = train_on_letters(experiment, kappa_bits=settings.kappa_bits, seed=seed, callback=follow)
    note("Free Transformer on letters: what its plans hold", TRAINING)
    measured = measure_letters(model, law, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    information = bit_information(model, law, n_sequences=N_SEQUENCES, generator=generator)
    held = [
        held_spreads(model, law, bit, generator=generator, seed=seed)
        for bit in range(experiment.n_latent_bits)
    ]
    return {
        "law": {"n_characters": law.n_characters, "run_length": law.run_length, "n_starts": law.n_starts},
        "n_bits": experiment.n_latent_bits * law.n_tokens,
        "plan_bits": measured.bounds.kl_bits * law.n_targets,
        "place_bits": math.log2(law.n_starts),
        "measured": measured.to_dict(),
        "distribution": asdict(law_statistics(law, generator=generator)),
        "samples": written_samples(model, law, seed),
        "information": information.tolist(),
        "mean_information": information.mean(1).tolist(),
        "held": held,
    }
