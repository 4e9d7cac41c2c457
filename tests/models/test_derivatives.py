"""Derivatives of whole models: second ones are right or refused, `torch.func` gives the first or says why not."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from decoder_cases import SIZES, liven, plan_by_tokens, tokens_of
from derivative_cases import REFUSAL, WARNINGS, assert_right_or_refused, by_differences
from helmholtz import kernels
from helmholtz.layers.equilibrium_config import AdjointName
from helmholtz.layers.fem_config import PRIORS
from helmholtz.models import MODELS
from helmholtz.models.decoder import Decoder
from helmholtz.ops import binary_latent
from hybrid_cases import hybrid

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MODELS},
    **{f"fem_lm, {prior}": ("fem_lm", {"prior": prior}) for prior in PRIORS},
    **{f"mamba_hopfield, {name}": ("mamba_hopfield", {"adjoint": name}) for name in get_args(AdjointName)},
}
every_model = pytest.mark.parametrize("name", CASES)
pytestmark = WARNINGS


def make(name: str) -> Decoder:
    architecture, options = CASES[name]
    if architecture == "decoder":
        return hybrid("mixed", "middle", "equilibrium")
    config = MODELS[architecture].config_class
    known = {field.name for field in fields(config)}
    return liven(MODELS[architecture](config(**{k: v for k, v in SIZES.items() if k in known} | options)))


def projection(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A linear function of a model's logits by its embedding: second derivatives come through the model alone."""
    plan_by_tokens(monkeypatch)
    torch.manual_seed(1)
    model = make(name).double()
    tokens, generator = tokens_of(2, 5), torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, 37, generator=generator, dtype=torch.float64)

    def call(embedding: Tensor) -> Tensor:
        given = {"embed.weight": embedding}
        return (torch.func.functional_call(model, given, (tokens,)).logits * weights).sum()

    return call, model.embed.weight.detach().clone().requires_grad_()


@every_model
def test_second_derivatives_are_right_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, x = projection(name, monkeypatch)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = by_differences_of_a_plan(f, x, v) if name == "free_transformer" else None
    assert_right_or_refused(f, x, v, expected=expected)


def by_differences_of_a_plan(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """What a lookup adds, ``G - detach(G)``, has a gradient and no value: differences do not see it. The function with
    ``G - G(x)`` in its place has the same derivatives at ``x`` and a value beside it."""
    at_x: list[Tensor] = []

    def zero_at_x(low: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
        joint = low * weight.unsqueeze(-1)
        at_x.append(joint.detach())
        return (joint - at_x[0]) @ vectors

    with pytest.MonkeyPatch.context() as patch, kernels.plain_forms():
        patch.setattr(binary_latent, "_zero_of_a_tile", zero_at_x)
        f(x)
        return by_differences(f, x, v)


@every_model
def test_torch_func_gives_the_first_derivative_or_says_why_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, x = projection(name, monkeypatch)
    try:
        found = torch.func.grad(f)(x)
    except RuntimeError as error:
        assert not name.startswith("transformer") and re.search(REFUSAL, str(error)), error
    else:
        torch.testing.assert_close(found, torch.autograd.grad(f(x), x)[0])
