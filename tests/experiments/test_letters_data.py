import itertools
import math

import pytest
import torch

from helmholtz.experiments.letters.data import (
    BLANK,
    MARK,
    N_LETTERS,
    NOISE,
    LetterLaw,
    letters_to_text,
    log_likelihood,
    noise_floor,
    possible_starts,
    run_starts,
    sample_letters,
    vanilla_floor,
)

PAPER, SMALL = LetterLaw(), LetterLaw(n_characters=32, run_length=6)


def sample(law, n, seed=0):
    return sample_letters(law, n, generator=torch.Generator().manual_seed(seed))


def probability(law, line):
    """Of a line given that its letter is 0, by summing over the starts."""
    total = 0.0
    for start in range(law.n_starts):
        p = 1 / law.n_starts
        for place, token in enumerate(line):
            own = 0 if start <= place < start + law.run_length else BLANK
            p *= law.noise * (token == NOISE) + (1 - law.noise) * (token == own)
        total += p
    return total


def lines(law):
    return list(itertools.product((0, BLANK, NOISE), repeat=law.n_characters))


@pytest.mark.parametrize("law", [PAPER, SMALL])
def test_a_sequence_is_a_prompt_and_a_run_on_a_line(law):
    tokens = sample(LetterLaw(n_characters=law.n_characters, run_length=law.run_length, noise=0.0), 500)
    assert tokens.shape == (500, law.n_tokens)
    letter = tokens[:, :1]
    assert letter.min() >= 0 and letter.max() < N_LETTERS
    assert (tokens[:, 1] == MARK).all()
    own = tokens[:, 2:] == letter
    assert (own | (tokens[:, 2:] == BLANK)).all()
    assert (own.sum(1) == law.run_length).all()
    rises = (own[:, 1:] & ~own[:, :-1]).sum(1) + own[:, 0]
    assert (rises == 1).all()


def test_letters_starts_and_noise_have_their_frequencies():
    n, law = 20_000, PAPER
    tokens = sample(law, n)
    letters = torch.bincount(tokens[:, 0], minlength=N_LETTERS)
    assert (letters - n / N_LETTERS).abs().max() < 4.5 * math.sqrt(n / N_LETTERS)
    starts = torch.bincount(run_starts(law, tokens).floor().long(), minlength=law.n_starts)
    # the run is ambiguous by one place in 2/256 of the lines, which moves them half a place down
    assert (starts - n / law.n_starts).abs().max() < 4.5 * math.sqrt(
        n / law.n_starts
    ) + n / law.n_starts / 128
    noise = (tokens[:, 2:] == NOISE).double()
    assert abs(noise.mean() - law.noise) < 4 * math.sqrt(law.noise * (1 - law.noise) / noise.numel())
    per_place = (noise.mean(0) - law.noise).abs().max()
    assert per_place < 4.5 * math.sqrt(law.noise * (1 - law.noise) / n), "the run is hit like the rest"


def test_noise_at_two_places_is_independent():
    noise = (sample(SMALL, 20_000)[:, 2:] == NOISE).double()
    covariance = torch.cov(noise.T) - torch.diag(noise.var(0))
    q = SMALL.noise
    assert covariance.abs().max() < 5 * q * (1 - q) / math.sqrt(20_000)


def test_the_generator_decides():
    assert torch.equal(sample(PAPER, 50, seed=3), sample(PAPER, 50, seed=3))
    assert not torch.equal(sample(PAPER, 50, seed=3), sample(PAPER, 50, seed=4))


def test_text():
    text = letters_to_text(sample(PAPER, 1)[0].tolist())
    assert len(text) == 66
    assert text[1] == ">"
    assert set(text[2:]) <= {text[0], "_", "!"}
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 29\), got 29"):
        letters_to_text([29])


@pytest.mark.parametrize(
    ("n_characters", "run_length", "noise"),
    [(5, 2, 0.25), (6, 1, 0.4), (7, 3, 0.5), (4, 4, 0.2), (6, 2, 0.0), (8, 3, 0.7), (5, 1, 0.9)],
)
def test_the_floor_is_the_entropy_by_enumeration(n_characters, run_length, noise):
    law = LetterLaw(n_characters=n_characters, run_length=run_length, noise=noise)
    chances = [probability(law, line) for line in lines(law)]
    assert sum(chances) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in chances if p > 0)
    assert vanilla_floor(law) == pytest.approx(entropy / law.n_targets, rel=1e-12)


@pytest.mark.parametrize(("law", "vanilla", "noise"), [(PAPER, 0.2923, 0.2302), (SMALL, 0.3264, 0.2267)])
def test_floors_of_the_two_sizes(law, vanilla, noise):
    assert vanilla_floor(law) == pytest.approx(vanilla, abs=5e-5)
    assert noise_floor(law) == pytest.approx(noise, abs=5e-5)
    # without the lines whose noise hides where the run starts, the difference would be ln of the number of starts
    known = (vanilla_floor(law) - noise_floor(law)) * law.n_targets
    assert 0 < math.log(law.n_starts) - known < 0.01


def test_likelihood_is_that_of_the_enumeration():
    law = LetterLaw(n_characters=5, run_length=2, noise=0.25)
    every = lines(law)
    tokens = torch.tensor([(0, MARK, *line) for line in every])
    expected = torch.tensor([probability(law, line) for line in every], dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(law, tokens).exp(), expected, rtol=1e-12, atol=0)


def test_mean_likelihood_of_samples_is_the_floor():
    nats = -log_likelihood(SMALL, sample(SMALL, 20_000)) / SMALL.n_targets
    assert abs(nats.mean() - vanilla_floor(SMALL)) < 4 * nats.std() / math.sqrt(len(nats))


def tokens_of(text):
    names = {"_": BLANK, "!": NOISE, ">": MARK}
    return torch.tensor([[names.get(c, ord(c) - ord("A")) for c in text]])


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("K>_KKK_", [1]),
        ("K>_!KK!", [1, 2]),
        ("K>!!K!!", [0, 1, 2]),
        ("K>!!!!!", [0, 1, 2]),
        ("K>!KK__", [0]),
        ("K>_KK__", []),
        ("K>_KKKK", []),
        ("K>_KJK_", []),
        ("K>_K>K_", []),
        ("K__KKK_", []),
        ("!>_KKK_", []),
    ],
)
def test_possible_starts(text, starts):
    law = LetterLaw(n_characters=5, run_length=3)
    possible = possible_starts(law, tokens_of(text))[0]
    assert possible.nonzero().flatten().tolist() == starts
    mean = run_starts(law, tokens_of(text)).item()
    assert mean == pytest.approx(sum(starts) / len(starts)) if starts else math.isnan(mean)
    assert math.isinf(log_likelihood(law, tokens_of(text)).item()) == (not starts)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"run_length": 0}, "run_length must be an integer of at least 1, got 0"),
        ({"n_characters": 7}, "n_characters must be an integer of at least 8, got 7"),
        ({"noise": 1.0}, r"noise must be in \[0, 1\), got 1.0"),
        ({"noise": -0.1}, r"noise must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        LetterLaw(**sizes)


def test_bad_calls():
    with pytest.raises(ValueError, match="n_sequences must be an integer of at least 1, got 0"):
        sample(PAPER, 0)
    with pytest.raises(ValueError, match="of 66 tokens each"):
        possible_starts(PAPER, sample(SMALL, 2))
