"""Which bits of a plan say where the run of a sequence stands, and which decide it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.experiments.letters.data import (
    N_LETTERS,
    LetterLaw,
    possible_starts,
    sample_letters,
)
from helmholtz.experiments.letters.report import (
    BATCH_SIZE,
    GROUP_SIZE,
    N_GROUPS,
    group_statistics,
    sample_letter_groups,
)
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, require_plan


@torch.no_grad()
def bit_information(
    model: Decoder, law: LetterLaw, *, n_sequences: int, generator: torch.Generator
) -> Float[Tensor, "H T"]:
    r"""Mutual information in bits between the run's start and each bit of the plan that the encoder gives a sequence.

    .. math:: I = h(\mathrm{E}\, p) - \mathrm{E}_s\, h(\mathrm{E}[p \mid s])

    with ``p`` the bit's probability, ``h`` the entropy of a bit and ``s`` the start. Of ``n`` sequences it is too high
    by about ``n_starts / (2 n ln 2)`` where there is none. Each bit is asked alone: what several say together is more.

    Sequences whose start cannot be told are left out.
    """
    require_plan(model)
    tokens = sample_letters(law, n_sequences, generator=generator)
    possible = possible_starts(law, tokens)
    known = possible.sum(1) == 1
    tokens, start = tokens[known], possible[known].double().argmax(1)
    with evaluation_mode(model):
        found = [_posterior(model, part) for part in tokens.split(BATCH_SIZE)]
    p = torch.cat(found)
    groups = [p[start == place] for place in start.unique()]
    within = sum(len(group) / len(p) * _entropy(group.mean(0)) for group in groups)
    return (_entropy(p.mean(0)) - within).T


def _posterior(model: Decoder, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
    """Probability of each bit."""
    logits = model.sample_posterior(model.lower(tokens)).logits
    assert logits is not None
    return logits.double().sigmoid()


def _entropy(p: Tensor) -> Tensor:
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / torch.log(torch.tensor(2.0))


def held_spreads(
    model: Decoder, law: LetterLaw, bit: int, *, generator: torch.Generator, seed: int
) -> dict[str, float | None]:
    """Spread of the run's start among samples that share this bit of every token's code, and among samples that share
    all other bits."""
    letters = torch.randint(N_LETTERS, (N_GROUPS,), generator=generator).tolist()
    mask = torch.full((law.n_tokens,), 1 << bit)
    spreads = {}
    for name, held in (("this_shared", mask), ("others_shared", ~mask)):
        tokens = sample_letter_groups(
            model, law, letters, size=GROUP_SIZE, shared=True, generator=generator, seed=seed, held=held
        )
        spreads[name] = group_statistics(law, tokens).spread
    return spreads
