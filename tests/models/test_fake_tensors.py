"""Decoders on fake tensors, which have shapes and no values: no forward or backward pass looks at a number."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

from decoder_cases import tokens_of
from every_decoder import DECODERS
from helmholtz import kernels
from helmholtz.models import Decoder
from helmholtz.solvers import SolverConfig


def trained_on_nothing(model: Decoder, tokens: Tensor, **options: Tensor) -> None:
    """A forward and a backward pass."""
    tensors, mode = dict(model.named_parameters()) | dict(model.named_buffers()), FakeTensorMode()
    with mode:
        fake = {key: mode.from_tensor(x) for key, x in tensors.items()}
        options = {key: mode.from_tensor(x) for key, x in options.items()}
        logits = functional_call(model, fake, (mode.from_tensor(tokens),), options).logits
        logits.sum().backward()
    assert logits.shape == (*tokens.shape, model.config.vocab_size)
    assert fake["embed.weight"].grad.shape == model.embed.weight.shape


@pytest.mark.parametrize("name", DECODERS)
def test_no_pass_of_a_decoder_looks_at_values(name):
    model = DECODERS[name]().train()
    if model.equilibrium is not None:
        model.solver = SolverConfig(max_steps=2)
        model.equilibrium.adjoint = type(model.equilibrium.adjoint)(max_steps=2)
    trained_on_nothing(model, tokens_of(2, 10), attention_mask=torch.ones(2, 10, dtype=torch.bool))
    packed = torch.tensor([0, 4, 10])
    trained_on_nothing(model, tokens_of(1, 10), cu_seqlens=packed)
    with kernels.plain_forms():
        trained_on_nothing(model, tokens_of(2, 10))
        trained_on_nothing(model, tokens_of(1, 10), cu_seqlens=packed)


def test_fake_tensors_have_no_values():
    """What the test above rests on."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(2).sum().item()
