"""Training on the synthetic law of ``letters.data``: sizes, schedule, and a loop over fresh sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helmholtz._checks import check_integer
from helmholtz.experiments.letters.data import ALPHABET, LetterLaw, sample_letters
from helmholtz.models.decoder import Decoder
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.training.config import TrainConfig
from helmholtz.training.fit import FitCallback
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.loop import seed_everything
from helmholtz.training.objectives import ObjectiveFunction, next_token
from helmholtz.training.sequences import train_on_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterExperiment:
    """Everything that, with kappa and a seed, fixes a trained model."""

    law: LetterLaw
    d_model: int
    n_layers: int = 4
    n_heads: int = 4
    n_latent_bits: int
    tie_embeddings: bool = False
    """Tied, these small models learn to plan the noise several times later."""
    steps: int
    batch_size: int = 64
    lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01

    def train_config(self, seed: int) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.law.n_targets,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            seed=seed,
        )

    def build(self, *, planned: bool) -> Decoder:
        """A new Free Transformer, or without a plan the baseline decoder of the same width and depth."""
        sizes: dict[str, Any] = {
            "vocab_size": len(ALPHABET),
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "max_seq_len": self.law.n_tokens,
            "tie_embeddings": self.tie_embeddings,
        }
        if planned:
            return FreeTransformer(FreeTransformerConfig(**sizes, n_latent_bits=self.n_latent_bits))
        return Transformer(TransformerConfig(**sizes))


PROFILES = {
    "ci": LetterExperiment(
        law=LetterLaw(n_characters=32, run_length=6), d_model=48, n_latent_bits=4, steps=800
    ),
    "paper": LetterExperiment(law=LetterLaw(), d_model=64, n_latent_bits=8, steps=1500),
}
"""``ci`` takes about a minute of one core per model, ``paper`` (whose law is the paper's) about five."""


def train_on_letters(
    experiment: LetterExperiment,
    *,
    kappa_bits: float | None,
    seed: int,
    callback: FitCallback | None = None,
    build: Callable[[], Decoder] | None = None,
) -> Decoder:
    """Train on fresh sequences: a Free Transformer with ``kappa_bits`` free bits per token, or the baseline if None.

    Args:
        build: makes another model in place of the experiment's, with a plan unless ``kappa_bits`` is None.

    The seed fixes the initial weights, the sequences and the plans drawn; torch's global generators are set.

    Raises: ValueError for a negative kappa, NonFiniteError if the loss is not finite.
    """
    check_integer("seed", seed, minimum=0)
    objective: ObjectiveFunction = next_token
    if kappa_bits is not None:
        objective = FreeBitsObjective(FreeBitsConfig(kappa_bits=kappa_bits))
    seed_everything(seed)
    model = build() if build is not None else experiment.build(planned=kappa_bits is not None)
    train_on_sequences(
        model,
        lambda n, generator: sample_letters(experiment.law, n, generator=generator),
        experiment.train_config(seed),
        objective=objective,
        callback=callback,
    )
    return model
