import math

import pytest
import torch

from helmholtz.experiments.letters.data import MARK, NOISE, LetterLaw, sample_letters
from helmholtz.experiments.letters.report import (
    GroupStatistics,
    LetterBounds,
    LetterResult,
    group_statistics,
    kappa_label,
    law_statistics,
    letter_bounds,
    measure_letters,
    plot_letters,
    sample_letter_groups,
)
from helmholtz.experiments.letters.run import LetterExperiment, train_on_letters

LAW = LetterLaw(n_characters=12, run_length=3)
TINY = LetterExperiment(
    law=LAW, d_model=16, n_layers=2, n_heads=2, n_latent_bits=3, steps=5, batch_size=4, warmup_steps=1
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model(kappa=None):
    return train_on_letters(TINY, kappa_bits=kappa, seed=0)


def groups(law, n, size, *, same_start=False, same_noise=False):
    """Samples of the distribution whose groups share what is asked for."""
    letter = torch.arange(n).view(n, 1, 1) % 26
    g = generator()
    start = torch.randint(law.n_starts, (n, 1 if same_start else size), generator=g).expand(n, size)
    noisy = torch.rand(n, 1 if same_noise else size, law.n_characters, generator=g) < law.noise
    line = torch.where(law.windows()[start], letter, 26).masked_fill(noisy, NOISE)
    prompt = torch.cat([letter, torch.full_like(letter, MARK)], -1).expand(n, size, 2)
    return torch.cat([prompt, line], -1)


def test_independent_samples_have_the_spread_of_the_law_and_repeat_nothing():
    law = LetterLaw()
    found = group_statistics(law, groups(law, 200, 16))
    assert found.valid == 1
    assert 0.8 * law.n_starts / 4 < found.spread < law.n_starts / 4, "of 16 samples it is a little less"
    assert abs(found.noise_repetition) < 0.01


def test_samples_that_share_the_start_have_no_spread():
    found = group_statistics(LetterLaw(), groups(LetterLaw(), 50, 16, same_start=True))
    assert found.spread < 0.1
    assert abs(found.noise_repetition) < 0.02


def test_samples_that_share_the_noise_repeat_it():
    found = group_statistics(LetterLaw(), groups(LetterLaw(), 50, 16, same_noise=True))
    assert found.noise_repetition == pytest.approx(1)
    assert found.spread > 10


def test_a_rate_of_noise_that_varies_by_place_is_no_repetition():
    law = LetterLaw()
    tokens = groups(law, 100, 16)
    rate = torch.linspace(0, 1, law.n_characters)
    tokens[:, :, 2:][torch.rand(100, 16, law.n_characters, generator=generator()) < rate] = NOISE
    assert abs(group_statistics(law, tokens).noise_repetition) < 0.01


def test_samples_that_are_not_of_the_law_are_counted_and_left_out():
    law = LetterLaw()
    tokens = groups(law, 4, 16, same_start=True)
    tokens[:, :12, 5] = 28
    found = group_statistics(law, tokens)
    assert found.valid == pytest.approx(0.25)
    assert found.spread < 0.1
    tokens[:, 12, 5] = 28
    assert group_statistics(law, tokens).spread is None


def test_statistics_need_groups():
    tokens = groups(LAW, 2, 2)
    with pytest.raises(ValueError, match="groups must be an integer of at least 2, got 1"):
        group_statistics(LAW, tokens[:1])
    with pytest.raises(ValueError, match="size must be an integer of at least 2, got 1"):
        group_statistics(LAW, tokens[:, :1])


def test_a_decoder_without_a_plan_has_one_cross_entropy():
    plain = model()
    found = letter_bounds(plain, LAW, generator=generator(), n_sequences=300)
    assert found.posterior_cross_entropy == found.prior_cross_entropy
    assert (found.kl, found.n_sequences) == (0, 300)
    tokens = sample_letters(LAW, 300, generator=generator())
    log_p = plain(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert found.prior_cross_entropy == pytest.approx(-log_p.mean().item(), rel=1e-6)
    assert found.elbo > found.law, "an untrained model pays more than the distribution"


def test_bounds_of_a_planned_model():
    planned = model(kappa=1.0)
    found = letter_bounds(planned, LAW, generator=generator(), n_sequences=300)
    assert 0 < found.kl < TINY.n_latent_bits * math.log(2)
    assert found.elbo == found.posterior_cross_entropy + found.kl
    assert found.excess == found.elbo - found.law
    assert found.kl_bits == pytest.approx(found.kl / math.log(2))
    assert found.posterior_cross_entropy != found.prior_cross_entropy


@pytest.mark.parametrize("kappa", [None, 1.0])
def test_groups_begin_with_their_prompt_and_are_reproducible(kappa):
    trained = model(kappa)

    def write(seed):
        return sample_letter_groups(
            trained, LAW, [3, 5], size=4, shared=True, generator=generator(seed), seed=seed
        )

    tokens = write(0)
    assert tokens.shape == (2, 4, LAW.n_tokens)
    assert (tokens[:, :, 0] == torch.tensor([[3], [5]])).all()
    assert (tokens[:, :, 1] == MARK).all()
    assert torch.equal(tokens, write(0))
    assert not torch.equal(tokens, write(1))


def test_plans_are_shared_within_groups_only(monkeypatch):
    planned, seen = model(1.0), []

    def spy(model, prompts, settings, plan):
        seen.append(torch.tensor(plan.codes).view(2, 4, LAW.n_tokens))
        return generate_planned(model, prompts, settings, plan)

    from helmholtz.models.generation import generate_planned

    monkeypatch.setattr("helmholtz.experiments.letters.report.generate_planned", spy)
    for shared in (True, False):
        sample_letter_groups(planned, LAW, [3, 5], size=4, shared=shared, generator=generator(), seed=0)
    same, own = seen
    assert (same == same[:, :1]).all()
    assert not torch.equal(same[0], same[1])
    assert len(own.flatten(0, 1).unique(dim=0)) == 8


def test_a_result_survives_its_file():
    result = measure_letters(model(0.5), LAW, seed=0)
    assert LetterResult.from_dict(result.to_dict()) == result
    assert result.bounds.n_sequences >= 2000


def test_the_law_measured_like_a_model():
    found = law_statistics(LetterLaw(), generator=generator())
    assert found.valid == 1
    assert 10 < found.spread < 57 / 4
    assert abs(found.noise_repetition) < 0.02


def test_labels():
    assert [kappa_label(k) for k in (None, 1 / 64, 0.25, 1.0, 1.5, 8.0)] == [
        "no plan",
        "1/64",
        "1/4",
        "1",
        "3/2",
        "8",
    ]


def test_picture_of_models_some_without_a_valid_sample(tmp_path):
    def result(spread):
        groups = GroupStatistics(0.5, spread, 0.1)
        return LetterResult(LetterBounds(0.2, 0.4, 0.1, 0.3, 2000), groups, groups)

    measured = [(None, result(5.0)), (0.25, result(2.0)), (0.25, result(3.0)), (4.0, result(None))]
    plot_letters(LAW, measured, GroupStatistics(1.0, 6.0, 0.0), tmp_path / "new" / "letters.png")
    assert (tmp_path / "new" / "letters.png").read_bytes()[:4] == b"\x89PNG"
