from dataclasses import replace

import pytest
import torch

from helmholtz.experiments.letters.data import LetterLaw
from helmholtz.experiments.letters.run import PROFILES, LetterExperiment, train_on_letters
from helmholtz.models import FreeTransformer, Transformer

TINY = LetterExperiment(
    law=LetterLaw(n_characters=12, run_length=3), d_model=16, n_layers=2, n_heads=2, n_latent_bits=3, steps=6,
    batch_size=4, warmup_steps=2,
)  # fmt: skip


def weights(**changes):
    settings = {"kappa_bits": 0.5, "seed": 0} | changes
    return torch.cat([p.flatten() for p in train_on_letters(TINY, **settings).parameters()])


def test_the_seed_decides_and_kappa_matters():
    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=1))
    assert not torch.equal(weights(kappa_bits=0.0), weights(kappa_bits=3.0))


def test_no_kappa_is_the_baseline_of_the_same_sizes():
    plain, planned = (train_on_letters(TINY, kappa_bits=kappa, seed=0) for kappa in (None, 0.5))
    assert type(plain) is Transformer
    assert type(planned) is FreeTransformer
    same = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "rope_theta")
    assert all(getattr(plain.config, name) == getattr(planned.config, name) for name in same)


def test_the_callback_sees_every_step():
    seen = []
    train_on_letters(TINY, kappa_bits=0.5, seed=0, callback=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(0 < loss < 10 for _, loss in seen)


@pytest.mark.parametrize("kappa", [None, 0.5])
def test_the_loss_falls(kappa):
    losses = []
    longer = replace(TINY, steps=60)
    train_on_letters(longer, kappa_bits=kappa, seed=0, callback=lambda step, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_profiles_are_those_of_the_experiment():
    ci, paper = PROFILES["ci"], PROFILES["paper"]
    assert (ci.law, ci.n_latent_bits, ci.steps) == (LetterLaw(n_characters=32, run_length=6), 4, 800)
    assert (paper.law, paper.n_latent_bits, paper.steps) == (LetterLaw(), 8, 1500)


@pytest.mark.parametrize("arguments", [{"kappa_bits": -1.0}, {"seed": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        weights(**arguments)
