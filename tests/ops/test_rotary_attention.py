"""Rotary attention of heads that lie side by side, as an attention layer computes it, against its reference."""

import pytest
import torch

from helmholtz.ops.attention import attention_step, softmax_attention
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


def in_steps(joint, cos, sin, heads, groups, lengths, mask=None):
    """The whole by steps of these lengths, in memory that is longer than it needs to be."""
    batch, time, _, width = joint.shape
    keys, values = torch.full((2, batch, groups, time + 3, width), torch.nan, dtype=joint.dtype)
    before, parts = 0, []
    for n in lengths:
        here = slice(before, before + n)
        seen = None if mask is None else mask[:, : before + n]
        parts.append(
            attention_step(
                joint[:, here].flatten(2), cos[..., here, :], sin[..., here, :], keys, values,
                before=before, heads=heads, key_mask=seen,
            )
        )  # fmt: skip
        before += n
    assert keys[:, :, before:].isnan().all() and values[:, :, before:].isnan().all()
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows_differ", [False, True])
@torch.no_grad()
def test_steps_are_the_whole(dtype, masked, rows_differ) -> None:
    joint, cos, sin, h, g = problem((3, 9, 4, 2, 4), dtype)
    positions = torch.arange(9).expand(3, -1)
    if rows_differ:
        positions = positions + torch.tensor([[0], [5], [1000]])
        cos, sin = rope_table(positions, 4)
    mask = torch.rand(3, 9) < 0.6 if masked else None
    got = in_steps(joint, cos, sin, h, g, [1, 1, 5, 1, 1], mask)
    q, k, v = joint.double().transpose(1, 2).split([h, g, g], dim=1)
    q, k = reference.rope(q, positions), reference.rope(k, positions)
    want = reference.softmax_attention(q, k, v, key_mask=mask).transpose(1, 2).flatten(2)
    # angles are float32, and rotated queries and keys are rounded to the dtype of the memory
    tolerance = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-4 if rows_differ else 1e-6
    assert got.dtype == dtype and (got - want).abs().max() < tolerance * want.abs().max()


@torch.no_grad()
def test_a_step_beyond_the_memory_is_refused() -> None:
    joint, cos, sin, h, g = problem((1, 2, 2, 1, 4))
    memory = torch.zeros(2, 1, 1, 5, 4)
    with pytest.raises(ValueError, match="keys"):
        attention_step(joint.flatten(2), cos, sin, *memory, before=4, heads=h)
    assert not memory.any()


@torch.no_grad()
@pytest.mark.parametrize("rows_differ", [False, True])
def test_what_a_step_writes_was_rounded_once(rows_differ) -> None:
    joint, cos, sin, h, g = problem((2, 3, 4, 2, 6), torch.bfloat16)
    positions = torch.arange(3) + (torch.tensor([[0], [1000]]) if rows_differ else 0)
    if rows_differ:
        cos, sin = rope_table(positions, 6)
    keys, values = torch.zeros(2, 2, g, 3, 6, dtype=torch.bfloat16)
    attention_step(joint.flatten(2), cos, sin, keys, values, before=0, heads=h)
    _, k, v = joint.transpose(1, 2).split([h, g, g], dim=1)
    a, b = k.double().chunk(2, dim=-1)
    c, s = (x.double()[..., None, :, :] if rows_differ else x.double() for x in (cos, sin))
    wanted = torch.cat([a, b], -1) * c + torch.cat([b, a], -1) * s
    bound = 2**-8 * wanted.abs() + 1e-6 * wanted.abs().amax()
    assert ((keys - wanted).abs() <= bound).all() and torch.equal(values, v)


@pytest.mark.parametrize("changed", ["keys", "values"])
def test_a_step_is_a_change_that_autograd_sees(changed) -> None:
    """What was kept of the memory for a gradient is no longer there."""
    joint, cos, sin, h, g = problem((1, 2, 2, 1, 4))
    memory = {name: torch.zeros(1, g, 5, 4) for name in ("keys", "values")}  # views would share one record
    kept = torch.ones(4, requires_grad=True) * memory[changed]
    with torch.no_grad():
        attention_step(joint.flatten(2), cos, sin, *memory.values(), before=1, heads=h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_step_in_inference_mode_is_the_same() -> None:
    with torch.inference_mode():
        joint, cos, sin, h, g = problem((1, 2, 2, 1, 4))
        memory = torch.zeros(2, 1, g, 5, 4)
        out = attention_step(joint.flatten(2), cos, sin, *memory, before=0, heads=h)
    wanted = reference.rotary_attention(joint, torch.arange(2).expand(1, -1), h, g)
    assert_matches("out", out, wanted.flatten(2), budget=60)
