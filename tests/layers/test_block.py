"""The block: pre-norm, two residuals, dropout only on what the branches write."""

import torch
from torch import nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout


def block(dropout: float = 0.0) -> Block:
    made = Block(Attention(16, 2), SwiGLU(16, 24), 16, norm_eps=1e-3, dropout=dropout)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return made


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def test_is_two_residual_branches_behind_norms() -> None:
    layer, x = block().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    h = x + layer.mixer(norm(x, layer.mixer_norm.weight))
    expected = h + layer.mlp(norm(h, layer.mlp_norm.weight))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_steps_equal_the_whole() -> None:
    layer, x = block(), torch.randn(2, 7, 16)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]])
    state = layer.init_state(2)
    first, state = layer(x[:, :4], state=state, attention_mask=mask[:, :4])
    layout = sequence_layout(x[:, 4:], mask[:, 4:], None, state.position)
    second, _ = layer(x[:, 4:], state=state, layout=layout)
    whole = layer(x, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(torch.cat([first, second], dim=1)[real], whole[real], rtol=1e-5, atol=1e-6)


def test_packed_sequences_are_as_each_alone() -> None:
    layer, x = block(), torch.randn(1, 7, 16)
    packed = layer(x, cu_seqlens=torch.tensor([0, 3, 7]))
    alone = torch.cat([layer(x[:, :3]), layer(x[:, 3:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_a_pad_of_zero_stays_zero() -> None:
    mask = torch.tensor([[1, 0, 1]])
    x = torch.randn(1, 3, 16).masked_fill(mask.unsqueeze(-1) == 0, 0)
    assert (block()(x, attention_mask=mask)[0, 1] == 0).all()


def test_dropout_removes_branches_never_the_stream() -> None:
    layer, x = block(dropout=0.9).train(), torch.randn(4, 50, 16)
    for y in (layer(x), layer(x, state=layer.init_state(4))[0]):
        assert 0.7 < (y == x).float().mean() < 0.9  # both dropped: 0.9^2
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and (layer(x) != x).all()
