"""Rotary attention of heads that lie side by side, as an attention layer computes it, against its reference."""

import pytest
import torch

from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.rope import rope_table, rotate_split
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads


def rotary_attention(joint, cos, sin, heads, groups, *, causal=True):
    q, k, v = rotate_split(joint, cos, sin, heads, groups)
    return softmax_attention(q, k, v, causal=causal).transpose(1, 2).flatten(2)


# B, T, H, G, K: one token, one head, one head per group and several
SHAPES = [(1, 1, 1, 1, 2), (2, 7, 3, 3, 6), (3, 9, 4, 2, 4), (1, 33, 6, 1, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape, dtype=torch.float32):
    b, t, h, g, k = shape
    return torch.randn(b, t, h + 2 * g, k).to(dtype), *rope_table(torch.arange(t), k), h, g


@every_shape
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_and_gradient_match_the_reference(shape, causal, dtype) -> None:
    joint, cos, sin, h, g = problem(shape, dtype)
    positions = torch.arange(shape[1]).expand(shape[0], -1)
    # angles are float32 in float64 too
    budget = 16 + 8 * shape[1] * 2.0**-24 / torch.finfo(dtype).eps
    out = rotary_attention(joint, cos, sin, h, g, causal=causal)
    assert out.dtype == dtype
    assert_matches(
        "out", out, reference.rotary_attention(joint, positions, h, g, causal=causal), budget=budget
    )
    cotangent = [torch.randn_like(out).double()]
    (got,) = grads(lambda x: [rotary_attention(x, cos, sin, h, g, causal=causal)], [joint], cotangent)
    (want,) = grads(
        lambda x: [reference.rotary_attention(x, positions, h, g, causal=causal)], [joint], cotangent
    )
    assert_matches("djoint", got, want, budget=2 * budget)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
def test_narrow_dtypes_stay_within_their_rounding(dtype) -> None:
    joint, cos, sin, h, g = problem(SHAPES[2], dtype)
    out = rotary_attention(joint, cos, sin, h, g)
    expected = reference.rotary_attention(joint, torch.arange(9).expand(3, -1), h, g)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_gradcheck() -> None:
    joint, cos, sin, h, g = problem((1, 3, 4, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary_attention(x, cos, sin, h, g), joint.requires_grad_())


def test_a_row_may_have_positions_of_its_own() -> None:
    joint, _, _, h, g = problem(SHAPES[1])
    positions = torch.stack([torch.arange(7), torch.arange(7) * 3 + 2])
    out = rotary_attention(joint, *rope_table(positions, 6), h, g)
    assert_matches("out", out, reference.rotary_attention(joint, positions, h, g), budget=60)


def test_huge_future_keys_and_values_change_no_bit_of_the_past() -> None:
    joint, cos, sin, h, g = problem((1, 128, 2, 2, 8))
    later = joint.clone()
    later[:, 64:, 2:4] *= 1e4
    later[:, 64:, 4:] = 1e30
    before, after = rotary_attention(joint, cos, sin, h, g), rotary_attention(later, cos, sin, h, g)
    assert torch.equal(before[:, :64], after[:, :64]) and not torch.equal(before, after)


def test_heads_must_add_up() -> None:
    joint, cos, sin, _, _ = problem(SHAPES[1])
    with pytest.raises(ValueError, match=r"joint: wanted 3 \+ 2 \* 2 heads, got 9"):
        rotary_attention(joint, cos, sin, 3, 2)
