"""Compiled layers: one graph, traced by Dynamo, differentiated by AOTAutograd, run eagerly (needs no C++ compiler)."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from helmholtz import kernels
from helmholtz.layers import Attention, FreeEnergyMixer, FreeEnergyMixerConfig, MambaMixer
from helmholtz.layers.fem_config import PRIORS

# the compiler itself warns about what it does
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore")]

D = 32
LAYERS = {
    "attention": lambda: Attention(D, 4, n_kv_heads=2),
    "mamba": lambda: MambaMixer(D, d_inner=64, d_state=8, d_head=16),
    **{f"fem-{prior}": lambda prior=prior: _mixer(prior) for prior in PRIORS},
}
MASK = torch.tensor([[0] * 3 + [1] * 15, [1] * 12 + [0] * 6])
CALLS = {
    "masked": lambda: {"attention_mask": MASK, "source": torch.randn(2, 18, D)},
    "packed": lambda: {"cu_seqlens": torch.tensor([0, 5, 18])},
}


def _mixer(prior: str) -> FreeEnergyMixer:
    layer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=D, n_heads=4, prior=prior, tdc_width=8))
    assert layer.tdc is not None
    nn.init.normal_(layer.tdc.out_proj.weight, std=0.1)
    return layer


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(
    layer: nn.Module, run: nn.Module, x: Tensor, options: dict[str, Tensor]
) -> list[Tensor]:
    y = run(x, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


PACKED_WITH_KERNELS = ["attention", "fem-softmax"]
"""Their kernel reads the bounds; the others' are told where sequences start."""
CASES = [
    *((name, "masked", "kernels") for name in LAYERS),
    *((name, "packed", "plain") for name in LAYERS),
    *((name, "packed", "kernels") for name in PACKED_WITH_KERNELS),
]


@pytest.mark.parametrize(("name", "call", "form"), CASES)
def test_a_mixer_is_one_graph(name, call, form):
    """Kernels stay calls in it."""
    layer, options = LAYERS[name](), CALLS[call]()
    x = torch.randn(2 if call == "masked" else 1, 18, D, requires_grad=True)
    with kernels.plain_forms() if form == "plain" else nullcontext():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        both = [outputs_and_gradients(layer, run, x, options) for run in (compiled, layer)]
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
