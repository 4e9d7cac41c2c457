"""Compiled layers: traced by Dynamo, differentiated by AOTAutograd, run eagerly (no C++ compiler is needed)."""

import pytest
import torch
from torch import Tensor, nn

from decoder_cases import codes_of, make_free, tokens_of
from helmholtz.layers import Attention, FreeEnergyMixer, FreeEnergyMixerConfig, MambaMixer
from helmholtz.layers.latent import Plan

# the compiler itself warns about what it does
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(layer: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def assert_compiled_equals_eager(layer: nn.Module, *, fullgraph: bool) -> None:
    x = torch.randn(2, 20, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    for actual, expected in zip(
        outputs_and_gradients(layer, compiled, x), outputs_and_gradients(layer, layer, x), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_attention_compiles_to_one_graph_with_its_dispatch():
    assert_compiled_equals_eager(Attention(32, 4, n_kv_heads=2), fullgraph=True)


@pytest.mark.parametrize("prior", ["softmax", "gla"])
def test_a_mixer_compiles_with_its_own_gradients_beside_the_graph(prior):
    layer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=32, n_heads=4, prior=prior))
    assert layer.tdc is not None
    nn.init.normal_(layer.tdc.out_proj.weight, std=0.1)
    assert_compiled_equals_eager(layer, fullgraph=False)


def test_a_mamba_mixer_compiles_with_its_own_gradients_beside_the_graph():
    layer = MambaMixer(32, d_inner=64, d_state=8, d_head=16)
    assert_compiled_equals_eager(layer, fullgraph=False)


def test_a_free_transformer_compiles_under_a_given_plan():
    model, tokens = make_free(n_layers=2), tokens_of(2, 12)
    bits = torch.randn(2, 12, 5, requires_grad=True)
    plan, leaves = Plan(codes_of(2, 12), bits), [bits, model.embed.weight, model.post_sampler.weight]
    results = []
    for run in (torch.compile(model, backend="aot_eager"), model):
        logits = run(tokens, z=plan).logits
        results.append([logits, *torch.autograd.grad(logits.square().mean(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
