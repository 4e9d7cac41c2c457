"""Which bits of a plan say, and decide, where a run stands."""

import math

import pytest
import torch

from helmholtz.experiments.letters import plan_bits, report
from helmholtz.experiments.letters.data import LetterLaw, possible_starts
from helmholtz.experiments.letters.plan_bits import bit_information, held_spreads
from helmholtz.experiments.letters.report import GROUP_SIZE, N_GROUPS, sample_letter_groups
from helmholtz.experiments.letters.run import LetterExperiment
from helmholtz.models.generation import PlannedRow

LAW = LetterLaw(n_characters=12, run_length=3)
SIZES = LetterExperiment(law=LAW, d_model=16, n_layers=2, n_heads=2, n_latent_bits=3, steps=1)


@pytest.fixture
def model():
    return SIZES.build(planned=True).eval()


def test_a_bit_that_tells_halves_apart_says_the_entropy_of_a_half_and_one_that_is_drawn_says_nothing(
    model, monkeypatch
):
    def posterior(model, tokens):
        late = (possible_starts(LAW, tokens).double().argmax(1) >= 5).double()
        per_bit = torch.stack([late, torch.full_like(late, 0.5), late * 0.5 + 0.25], 1)
        return per_bit.unsqueeze(1).expand(-1, LAW.n_tokens, -1)

    monkeypatch.setattr(plan_bits, "_posterior", posterior)
    found = bit_information(model, LAW, n_sequences=4000, generator=torch.Generator().manual_seed(0))
    assert found.shape == (3, LAW.n_tokens)
    assert found[0].tolist() == pytest.approx([1.0] * LAW.n_tokens, abs=0.01)
    assert found[1].abs().max() < 1e-12
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert found[2].tolist() == pytest.approx([1 - quarter] * LAW.n_tokens, abs=0.01)


def test_the_information_of_a_model_lies_between_nothing_and_a_bit(model):
    found = bit_information(model, LAW, n_sequences=300, generator=torch.Generator().manual_seed(0))
    assert (found >= 0).all() and (found <= 1).all()


def given_codes(monkeypatch):
    """What ``generate_planned`` was given; it writes nothing but the letter."""
    given = []

    def generate_planned(model, prompts, settings, plan):
        given.append(torch.tensor(plan.codes))
        return [PlannedRow([0] * LAW.n_characters, list(codes)) for codes in plan.codes]

    monkeypatch.setattr(report, "generate_planned", generate_planned)
    return given


def test_a_group_shares_the_bits_that_are_held_and_draws_the_others(model, monkeypatch):
    given = given_codes(monkeypatch)
    held = torch.tensor([0b101, *[0b010] * (LAW.n_tokens - 1)])
    generator = torch.Generator().manual_seed(0)
    sample_letter_groups(model, LAW, [3, 5], size=8, shared=True, generator=generator, seed=0, held=held)
    groups = given[0].view(2, 8, -1)
    assert ((groups & held) == (groups[:, :1] & held)).all()
    assert (groups[:, :, 0] & 0b010).unique().numel() == 2
    assert (groups[:, :, 1:] & 0b101).unique().numel() == 4


def test_a_bit_is_held_in_every_token_then_all_others_are(model, monkeypatch):
    given = given_codes(monkeypatch)
    found = held_spreads(model, LAW, 1, generator=torch.Generator().manual_seed(0), seed=0)
    assert found == {"this_shared": None, "others_shared": None}  # no sample is valid
    ours, others = (codes.view(N_GROUPS, GROUP_SIZE, -1) for codes in given)
    assert ((ours & 2) == (ours[:, :1] & 2)).all() and ((others & 5) == (others[:, :1] & 5)).all()
    assert (others & 2).unique().numel() == 2 and (ours & 5).unique().numel() == 4
