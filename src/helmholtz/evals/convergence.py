"""Does a model do what the theory of its equilibria promises: eight tests on one text, each with numbers and limits.

What is promised is derived in ``docs/math/equilibrium.md``; a model that was changed, or a regime that was left, shows
in the test that names it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.evals.convergence_case import AbstractTest, validation_case
from helmholtz.evals.convergence_energy import (
    ContractionTest,
    DescentTest,
    ResidualTest,
    check_contraction,
    check_descent,
    check_residual,
)
from helmholtz.evals.convergence_model import CausalityTest, GradientTest, check_causality, check_gradient
from helmholtz.evals.convergence_solutions import (
    LyapunovTest,
    StabilityTest,
    UniquenessTest,
    check_lyapunov,
    check_stability,
    check_uniqueness,
)
from helmholtz.evals.equilibria import random_tokens
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class ConvergenceReport:
    """What the eight tests found."""

    contraction: ContractionTest
    energy_descent: DescentTest
    stability: StabilityTest
    uniqueness: UniquenessTest
    lyapunov: LyapunovTest
    residual_energy: ResidualTest
    gradient: GradientTest
    causality: CausalityTest

    def tests(self) -> dict[str, AbstractTest]:
        """Each test by its name."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def all_passed(self) -> bool:
        return all(test.passed for test in self.tests().values())

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that did not pass."""
        return tuple(name for name, test in self.tests().items() if not test.passed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every test by its name, and ``all_passed``."""
        return {name: test.to_dict() for name, test in self.tests().items()} | {"all_passed": self.all_passed}


class ConvergenceValidator:
    """Tests a model's equilibria on one text. The model is left as it was: mode, solver, buffers, gradients.

    Args:
        tokens: ids of a text, ``B T``, without pads; None draws ``batch`` rows of ``time`` ids. They go through the
            model's blocks either way: a context that no text has would test another model.
        seed: of tokens, states and disturbances.

    Raises: ValueError for tokens that are not a batch of sequences of at least 2 tokens.
    """

    def __init__(
        self,
        model: Decoder,
        tokens: Shaped[Tensor, "..."] | None = None,
        *,
        seed: int = 0,
        batch: int = 2,
        time: int = 16,
    ) -> None:
        check_integer("seed", seed, minimum=0)
        if tokens is None:
            tokens = random_tokens(model, batch, time, generator=torch.Generator().manual_seed(seed))
        shape = tuple(tokens.shape)
        fits = len(shape) == 2 and shape[0] >= 1 and shape[1] >= 2
        check(fits, "tokens", shape, "of shape (B, T) with T at least 2")
        self.model, self.tokens, self.seed = model, tokens, seed

    def run_all_tests(self) -> ConvergenceReport:
        """All tests. Cost: some hundred passes of the solver over the text, and a few of the model in float64."""
        with evaluation_mode(self.model):
            case = validation_case(self.model, self.tokens, seed=self.seed)
            return ConvergenceReport(
                contraction=check_contraction(case),
                energy_descent=check_descent(case),
                stability=check_stability(case),
                uniqueness=check_uniqueness(case),
                lyapunov=check_lyapunov(case),
                residual_energy=check_residual(case),
                gradient=check_gradient(case),
                causality=check_causality(case),
            )
