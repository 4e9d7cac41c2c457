"""What each cell of the learning table must show. The limits were set on seeds 0, 1 and 2, then 3, 4 and 5 were run."""

from collections.abc import Sequence

from helmholtz.data.plan_letters import LetterLaw, vanilla_floor
from helmholtz.evals.plan_letters import LetterResult, kappa_label, measure_letters
from helmholtz.training.plan_letters import PROFILES, train_on_letters

KAPPAS = (None, 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
PROFILE = "ci"
LAW = PROFILES[PROFILE].law
UNIFORM_SPREAD = LAW.n_starts / 4
"""Median absolute deviation of a uniform start."""


def run_cell(kappa: float | None, seed: int) -> LetterResult:
    model = train_on_letters(PROFILES[PROFILE], kappa_bits=kappa, seed=seed)
    return measure_letters(model, LAW, seed=seed)


COLUMNS = ("kappa", "seed", "posterior", "prior", "excess", "KL bits", "valid", "spread", "repeats")


def line(values: Sequence[str]) -> str:
    return "".join(f"{value:>10}" for value in values)


def row(kappa: float | None, seed: int, result: LetterResult) -> str:
    """A line of the table under ``COLUMNS``."""
    b, shared = result.bounds, result.shared
    spread = "-" if shared.spread is None else f"{shared.spread:.1f}"
    numbers = [f"{x:.4f}" for x in (b.posterior_cross_entropy, b.prior_cross_entropy, b.excess)]
    shares = [f"{b.kl_bits:.3f}", f"{result.independent.valid:.2f}", spread, f"{shared.noise_repetition:.2f}"]
    return line([kappa_label(kappa), str(seed), *numbers, *shares])


def check_bounds(law: LetterLaw, result: LetterResult) -> None:
    """No future leaks but through the plan, whose price is in the ELBO."""
    b = result.bounds
    assert b.n_sequences >= 2000
    assert b.elbo >= vanilla_floor(law) - 0.01
    assert b.excess >= -0.002, "on the same sequences the law itself pays less"
    assert b.prior_cross_entropy >= b.law - 0.002


def check_cell(kappa: float | None, result: LetterResult) -> None:
    """The order of the paper's figure 4: nothing, then the place of the run, then its noise too, then a copy.

    Beside each limit, what seeds 0, 1 and 2 gave.
    """
    b, shared, independent = result.bounds, result.shared, result.independent
    gain = b.law - b.posterior_cross_entropy
    assert b.kl_bits <= 1.05 * (kappa or 0) + 0.01
    assert abs(independent.noise_repetition) < 0.02, "plans of their own have nothing in common"
    if kappa is None:
        assert (b.kl, b.posterior_cross_entropy) == (0, b.prior_cross_entropy)
        assert abs(gain) < 0.01  # -0.0022 to -0.0017
        assert shared == independent
        assert independent.valid > 0.85  # 0.96 to 0.97
    elif kappa == 1 / 64:
        assert abs(gain) < 0.01  # 0.0012 to 0.0022
        assert shared.spread > 0.6 * UNIFORM_SPREAD  # 0.73 to 0.86
        assert shared.noise_repetition < 0.05  # 0.00
        assert independent.valid > 0.85  # 0.95 to 0.97
    elif kappa == 1 / 16:
        assert 0.004 < gain < 0.04  # 0.013 to 0.019
        assert shared.spread < 0.8 * UNIFORM_SPREAD  # 0.58 to 0.66
        assert shared.noise_repetition < 0.05  # 0.00 to 0.02
        assert independent.valid > 0.85  # 0.95 to 0.96
    elif kappa == 1 / 4:
        assert gain > 0.04  # 0.063 to 0.066
        assert b.kl_bits > 0.18  # 0.249 to 0.250
        assert shared.spread < 0.5 * UNIFORM_SPREAD  # 0.35 to 0.45
        assert shared.noise_repetition < 0.2  # 0.09 to 0.12
        assert independent.valid > 0.8  # 0.95 to 0.96
    elif kappa == 1:
        assert gain > 0.1  # 0.19 to 0.22
        assert shared.spread < 0.4 * UNIFORM_SPREAD  # 0.11 to 0.21
        assert shared.noise_repetition > 0.2  # 0.33 to 0.47
    else:
        assert kappa == 4
        assert gain > 0.2  # 0.246 to 0.314
        assert b.prior_cross_entropy - b.posterior_cross_entropy > 1  # 1.3 to 2.7
        assert shared.noise_repetition > 0.5  # 0.72 to 0.87
        assert independent.valid < 0.6  # 0.03 to 0.26
