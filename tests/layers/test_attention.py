"""The baseline mixer against the textbook and against torch's own layer; its state."""

import pytest
import torch
from torch import Tensor, nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.state import KVCache, map_state
from helmholtz.ops.rope import rope


def textbook(layer: Attention, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """Attention with explicit scores in float64; ``visible`` is ``B T S``."""

    def heads(weight: Tensor) -> Tensor:
        y = (x.double() @ weight.double().T).unflatten(-1, (-1, layer.d_head)).transpose(1, 2)
        return y.repeat_interleave(layer.n_heads // y.shape[1], dim=1)

    q_weight, k_weight, v_weight = layer.in_proj.weight.split(
        [n * layer.d_head for n in (layer.n_heads, layer.n_kv_heads, layer.n_kv_heads)]
    )
    q, k = (rope(heads(weight), positions, theta=layer.rope_theta) for weight in (q_weight, k_weight))
    scores = (q @ k.transpose(-1, -2) / layer.d_head**0.5).masked_fill(~visible.unsqueeze(1), -torch.inf)
    read = scores.softmax(-1).nan_to_num() @ heads(v_weight)
    return read.transpose(1, 2).flatten(2) @ layer.o_proj.weight.double().T


def livened(layer: Attention) -> Attention:
    for proj in (layer.in_proj, layer.o_proj):
        nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_matches_the_textbook(causal: bool, groups: int, masked: bool) -> None:
    layer = livened(Attention(32, 4, n_kv_heads=groups, rope_theta=100.0, causal=causal))
    x = torch.randn(3, 11, 32)
    mask = torch.rand(3, 11) > 0.4 if masked else torch.ones(3, 11, dtype=torch.bool)
    lower = torch.ones(11, 11, dtype=torch.bool).tril() if causal else torch.ones(11, 11, dtype=torch.bool)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = textbook(layer, x, lower & mask.unsqueeze(1), positions)
    actual = layer(x, attention_mask=mask if masked else None)
    error = (actual - expected)[mask].abs().max() / expected[mask].abs().max()
    assert error < 2e-6
    assert (actual[~mask] == 0).all()


def test_at_equal_positions_it_is_multihead_attention() -> None:
    """Rotation by slow angles over a short sequence vanishes as theta grows: torch's own layer remains."""
    layer = livened(Attention(2 * 4, 4, rope_theta=1e4, causal=False))
    other = nn.MultiheadAttention(8, 4, bias=False, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(layer.in_proj.weight)
        other.out_proj.weight.copy_(layer.o_proj.weight)
    x = torch.randn(2, 1, 8)
    torch.testing.assert_close(layer(x), other(x, x, x)[0])


def test_packed_sequences_do_not_see_each_other_in_both_directions() -> None:
    for causal in (True, False):
        layer, x = livened(Attention(32, 4, causal=causal)), torch.randn(1, 12, 32)
        packed = layer(x, cu_seqlens=torch.tensor([0, 5, 12]))
        separate = torch.cat([layer(x[:, :5]), layer(x[:, 5:])], dim=1)
        torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-6)


def test_pads_give_and_get_no_gradient() -> None:
    layer, x = livened(Attention(32, 4)), torch.randn(2, 9, 32, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [0] * 9])
    layer(x, attention_mask=mask).square().sum().backward()
    assert (x.grad[mask == 0] == 0).all()
    assert (x.grad[mask == 1].abs().sum(-1) > 0).all()


def test_pads_of_nan_do_no_harm_to_the_real_tokens() -> None:
    layer, x = livened(Attention(32, 4)), torch.randn(1, 6, 32)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0]])
    spoiled = x.masked_fill(mask.unsqueeze(-1) == 0, 1e30)
    assert torch.equal(layer(x, attention_mask=mask), layer(spoiled, attention_mask=mask))


def test_a_bidirectional_layer_has_no_stream() -> None:
    layer = Attention(32, 4, causal=False)
    with pytest.raises(ValueError, match="init_state: .*causal=False"):
        layer.init_state(2)
    with pytest.raises(ValueError, match="state: .*causal=False"):
        layer.step(torch.randn(2, 1, 32), KVCache.empty(torch.zeros(2, dtype=torch.long), 4, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 4, 4), "n_heads must divide d_model, got n_heads=4 and d_model=30"),
        ((32, 4, 3), "n_kv_heads must divide n_heads, got n_kv_heads=3 and n_heads=4"),
        ((12, 4, 4), "d_model / n_heads must be even, as rotary embeddings turn pairs, got 3"),
        ((32, 0, 1), "n_heads must be an integer of at least 1, got 0"),
    ],
)
def test_head_counts_that_do_not_fit_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    d_model, n_heads, n_kv_heads = arguments
    with pytest.raises(ValueError, match=message):
        Attention(d_model, n_heads, n_kv_heads=n_kv_heads)


def test_the_cache_appends_without_changing_what_it_was() -> None:
    empty = KVCache.empty(torch.zeros(2, dtype=torch.long), 3, 4, 5)
    first = empty.append(torch.ones(2, 3, 6, 4).double(), torch.ones(2, 3, 6, 5).double())
    assert first.mask is None and first.position.tolist() == [6, 6]
    mask = torch.tensor([[True, False], [True, True]])
    second = first.append(torch.zeros(2, 3, 2, 4).double(), torch.zeros(2, 3, 2, 5).double(), mask)
    assert second.position.tolist() == [7, 8]
    assert second.mask.tolist() == [[True] * 7 + [False], [True] * 8]
    assert second.k.shape == (2, 3, 8, 4) and second.v.shape == (2, 3, 8, 5)
    assert empty.k.shape[2] == 0 and first.k.shape[2] == 6 and first.mask is None
    third = second.append(torch.zeros(2, 3, 1, 4).double(), torch.zeros(2, 3, 1, 5).double())
    assert third.mask.tolist() == [[True] * 7 + [False, True], [True] * 9]


def test_map_state_reaches_every_tensor_and_refuses_the_rest() -> None:
    cache = KVCache.empty(torch.zeros(3, dtype=torch.long), 1, 2, 2)
    picked = map_state(lambda x: x[:2], (cache, None, [torch.arange(3)]))
    assert picked[0].k.shape[0] == 2 and picked[0].mask is None and picked[0].position.shape == (2,)
    assert picked[1] is None and picked[2][0].tolist() == [0, 1]
    with pytest.raises(TypeError, match="state: .* found a int"):
        map_state(lambda x: x, (torch.zeros(1), 3))


def test_the_content_of_pads_does_not_matter_even_if_it_is_nan():
    layer, x, mask = Attention(16, 2), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    expected = layer(x, attention_mask=mask)
    assert torch.equal(layer(x.masked_fill(~mask.unsqueeze(-1), torch.nan), attention_mask=mask), expected)


def test_an_input_of_another_width_is_refused():
    layer = Attention(16, 2)
    for call in (lambda x: layer(x), lambda x: layer.step(x, layer.init_state(1))):
        with pytest.raises(ValueError, match=r"x: wanted shape \(B, T, d_model=16\), got \(1, 3, 12\)"):
            call(torch.zeros(1, 3, 12))
