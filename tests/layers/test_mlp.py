"""The feed-forward and the initialisation it shares with the other layers."""

import pytest
import torch
from torch import nn

from helmholtz.layers.init import init_normal, scale_residual
from helmholtz.layers.mlp import SwiGLU


def test_matches_the_equation() -> None:
    layer, x = SwiGLU(8, 12), torch.randn(2, 3, 8)
    for proj in (layer.gate_up_proj, layer.down_proj):
        nn.init.normal_(proj.weight)
    gate, up = (x.double() @ layer.gate_up_proj.weight.double().T).chunk(2, dim=-1)
    hidden = gate / (1 + (-gate).exp()) * up
    expected = hidden @ layer.down_proj.weight.double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_zero_stays_zero_and_parameters_are_three_matrices() -> None:
    layer = SwiGLU(8, 12)
    assert (layer(torch.zeros(1, 2, 8)) == 0).all()
    assert sum(p.numel() for p in layer.parameters()) == 3 * 8 * 12


def test_init_normal_reaches_linear_and_embedding_weights_and_clears_biases() -> None:
    module = nn.Sequential(nn.Embedding(200, 100), nn.Linear(100, 200), nn.LayerNorm(200))
    init_normal(module)
    for weight in (module[0].weight, module[1].weight):
        assert weight.std().item() == pytest.approx(300**-0.5, rel=0.03)
    assert (module[1].bias == 0).all() and (module[2].weight == 1).all()


def test_scale_residual_keeps_the_variance_of_the_stream() -> None:
    projections = [nn.Linear(64, 64, bias=False) for _ in range(9)]
    before = [p.weight.clone() for p in projections]
    scale_residual(projections)
    for old, projection in zip(before, projections, strict=True):
        torch.testing.assert_close(projection.weight, old / 3)
