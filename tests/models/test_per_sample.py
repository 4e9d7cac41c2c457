"""Gradients of single rows by ``torch.func.vmap``: they are those of the rows one by one."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from decoder_cases import codes_of, tokens_of
from every_decoder import DECODERS
from helmholtz.layers.latent import Plan
from helmholtz.models import Decoder
from helmholtz.solvers import Phantom, SolverConfig, Unrolled
from helmholtz.solvers.base import MODES

ROWS = ["transformer", "fem-hybrid", "fem-linear", "fem-rnn_softmax", "free", "mamba", "hybrid-fem-untied"]
EQUILIBRIA = {mode: SolverConfig(mode=mode, max_steps=30, on_nonconvergence="ignore") for mode in MODES}


@pytest.mark.parametrize("name", ROWS)
def test_gradients_per_row(name):
    assert_gradients_of_rows(DECODERS[name]().eval())


@pytest.mark.parametrize("mode", EQUILIBRIA)
@pytest.mark.parametrize("adjoint", [Phantom(n_steps=4), Unrolled(n_steps=4)], ids=["phantom", "unrolled"])
def test_gradients_per_row_of_equilibria(adjoint, mode):
    model = DECODERS["mamba-hopfield"]().eval()
    model.solver, model.equilibrium.adjoint = EQUILIBRIA[mode], adjoint
    assert_gradients_of_rows(model)


def test_the_implicit_gradient_is_none_of_single_rows():
    model = DECODERS["mamba-hopfield"]().eval()
    with pytest.raises(RuntimeError, match="neither transforms of torch.func"):
        assert_gradients_of_rows(model)


def assert_gradients_of_rows(model: Decoder) -> None:
    tokens, codes = tokens_of(3, 9), codes_of(3, 9)
    weights = {key: x.detach() for key, x in model.named_parameters()}

    def loss(weights, tokens, code):
        plan = None if model.plan is None else Plan(code[None])
        return functional_call(model, weights, (tokens[None],), {"z": plan}).logits.square().mean()

    found = vmap(grad(loss), (None, 0, 0))(weights, tokens, codes)
    for row in range(3):
        for key, wanted in grad(loss)(weights, tokens[row], codes[row]).items():
            torch.testing.assert_close(found[key][row], wanted, rtol=1e-4, atol=1e-6)
