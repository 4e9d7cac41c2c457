"""Gradients of single rows by ``torch.func.vmap``: they are those of the rows one by one."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from decoder_cases import codes_of, tokens_of
from every_decoder import DECODERS
from helmholtz.layers.latent import Plan


@pytest.mark.parametrize("name", ["mamba", "hybrid-fem-untied"])
def test_gradients_per_row(name):
    model, tokens, codes = DECODERS[name]().eval(), tokens_of(3, 9), codes_of(3, 9)
    weights = {key: x.detach() for key, x in model.named_parameters()}

    def loss(weights, tokens, code):
        plan = None if model.plan is None else Plan(code[None])
        return functional_call(model, weights, (tokens[None],), {"z": plan}).logits.square().mean()

    found = vmap(grad(loss), (None, 0, 0))(weights, tokens, codes)
    for row in range(3):
        for key, wanted in grad(loss)(weights, tokens[row], codes[row]).items():
            torch.testing.assert_close(found[key][row], wanted, rtol=1e-4, atol=1e-6)
