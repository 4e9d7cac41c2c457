"""Rotary positions: a true rotation, whatever the dtype and the offset."""

import pytest
import torch

from helmholtz.kernels import plain_forms
from helmholtz.ops.rope import rope, rope_table, rotate_split
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads

ANGLE = 2.0**-24
"""Relative rounding of a float32 angle."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 7, 6), (2, 1, 65, 64)], ids=str)
@pytest.mark.parametrize("offset", [0, 1000])
def test_output_and_gradient_match_the_reference(shape, dtype, offset):
    x = torch.randn(shape).to(dtype)
    positions = torch.arange(shape[2]) + offset + 3 * torch.arange(shape[0])[:, None]
    wide = torch.promote_types(dtype, torch.float32)
    budget = (
        4 + 4 * positions.max().item() * ANGLE / torch.finfo(wide).eps
    )  # angles are float32 in float64 too
    assert_matches("rope", rope(x, positions), reference.rope(x, positions), budget=budget)
    cotangents = [torch.randn_like(x).double()]
    (got,) = grads(lambda x: [rope(x, positions)], [x], cotangents)
    (want,) = grads(lambda x: [reference.rope(x, positions)], [x], cotangents)
    assert_matches("dx", got, want, budget=budget)


def test_gradcheck_once_and_twice(form):
    x, positions = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True), torch.arange(5)
    assert torch.autograd.gradcheck(lambda x: rope(x, positions), x)
    assert form == "kernel" or torch.autograd.gradgradcheck(lambda x: rope(x, positions), x)


@pytest.mark.parametrize("theta", [10.0, 10000.0, 5e5])
def test_norms_are_kept_and_logits_depend_on_the_offset_alone(theta):
    q, k = torch.randn(2, 16, dtype=torch.float64).unbind(0)
    rows = rope(torch.stack([q, k])[:, None, None].expand(2, 1, 200, 16), torch.arange(200), theta=theta)
    q_rows, k_rows = rows[:, 0].unbind(0)
    torch.testing.assert_close(q_rows.norm(dim=-1), q.norm().expand(200))
    for offset in (0, 1, 5, 60):
        logits = (q_rows[offset:] * k_rows[: 200 - offset]).sum(-1)
        assert logits.std() < 1e-4 * q.norm() * k.norm(), offset


def test_each_pair_turns_at_its_own_rate():
    turned = rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4), torch.arange(3), theta=100.0)[0, 0]
    for t in range(3):
        angles = torch.tensor([t * 1.0, t * 0.1])
        torch.testing.assert_close(turned[t], torch.cat([angles.cos(), angles.sin()]))


def test_positions_are_shared_or_per_row():
    x = torch.randn(2, 3, 5, 4)
    rows = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 9, 2]])
    both = rope(x, rows)
    assert torch.equal(both[:1], rope(x[:1], rows[0])) and torch.equal(both[1:], rope(x[1:], rows[1]))


def test_bfloat16_and_float16_keep_every_position_apart():
    x = torch.randn(64)
    positions = torch.arange(4096)
    exact = rope(x.expand(1, 1, 4096, 64), positions)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = x.to(dtype)
        got = rope(narrow.expand(1, 1, 4096, 64), positions)
        assert got.dtype == dtype
        assert_matches(
            str(dtype), got, reference.rope(narrow.expand(1, 1, 4096, 64), positions[None]), budget=4096
        )
        assert (got.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps * x.norm()
    cos, sin = rope_table(positions.to(torch.int32), 64)
    assert cos.dtype == torch.float32
    assert torch.stack([cos, sin], dim=-1)[:, 0].unique(dim=0).shape[0] == 4096


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="width: .* even .* got 5"):
        rope(torch.zeros(1, 1, 2, 5), torch.arange(2))
    with pytest.raises(ValueError, match="theta: .* positive"):
        rope(torch.zeros(1, 1, 2, 4), torch.arange(2), theta=0.0)


def test_no_tokens_are_no_tokens():
    assert rope(torch.zeros(2, 3, 0, 4), torch.arange(0)).shape == (2, 3, 0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_heads_side_by_side_are_turned_as_apart(dtype, rows) -> None:
    """To the bit, forward and backward, with and without gradients: 3 query heads, 2 of keys, 2 of values."""
    joint = torch.randn(2, 5, 7, 6).to(dtype).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 9, 2]]) if rows else torch.arange(5)
    cos, sin = rope_table(positions, 6)
    q, k, v = joint.transpose(1, 2).split([3, 2, 2], dim=1)
    apart = rope(q, positions), rope(k, positions), v
    together = rotate_split(joint, cos, sin, 3, 2)
    cotangents = [torch.randn_like(x) for x in apart]
    for a, b, c in zip(apart, together, rotate_split(joint.detach(), cos, sin, 3, 2), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    (expected,) = torch.autograd.grad(apart, joint, cotangents)
    (actual,) = torch.autograd.grad(together, joint, cotangents)
    assert torch.equal(actual, expected)


def test_heads_side_by_side_can_be_differentiated_twice_and_must_add_up(form) -> None:
    cos, sin = rope_table(torch.arange(3), 4)
    joint = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate_split(x, cos, sin, 2, 1), joint)
    assert form == "kernel" or torch.autograd.gradgradcheck(lambda x: rotate_split(x, cos, sin, 2, 1), joint)
    plain, graph = (
        torch.autograd.grad(
            sum(y.sin().sum() for y in rotate_split(joint, cos, sin, 2, 1)), joint, create_graph=c
        )
        for c in (False, True)
    )
    torch.testing.assert_close(graph[0], plain[0])
    with pytest.raises(ValueError, match=r"joint: wanted 3 \+ 2 \* 1 heads, got 4"):
        rotate_split(joint, cos, sin, 3, 1)


@pytest.mark.parametrize(
    "positions", [torch.arange(300), torch.tensor([[0, 3], [7, 1000]]).T, torch.tensor(5)], ids=str
)
def test_a_table_by_the_kernel_is_that_of_torchs_operations_to_the_bit(positions) -> None:
    found = rope_table(positions, 6, theta=100.0)
    with plain_forms():
        wanted = rope_table(positions, 6, theta=100.0)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_heads_that_lie_apart_and_gradients_of_any_layout_match_the_reference(dtype) -> None:
    """More tokens than a piece of work; joint heads within a wider tensor; every gradient laid out another way."""
    joint, positions = torch.randn(2, 21, 9, 12).to(dtype)[:, 1:20, 1:8, :6], torch.arange(19) + 3
    table, rows = rope_table(positions, 6), positions.expand(2, -1)
    leaf = joint.detach().requires_grad_()
    actual = rotate_split(leaf, *table, 3, 2)
    q, k, v = joint.transpose(1, 2).split([3, 2, 2], dim=1)
    expected = reference.rope(q, rows), reference.rope(k, rows), v.double()
    for name, a, e in zip("qkv", actual, expected, strict=True):
        assert_matches(name, a, e, budget=10 + 4 * 22 * ANGLE / torch.finfo(a.dtype).eps)
    cotangents = [torch.randn(2, 3, 19, 6), torch.randn(2, 19, 2, 6).transpose(1, 2),
                  torch.randn(6, 19, 2, 2).permute(2, 3, 1, 0)]  # fmt: skip
    cotangents = [x.to(dtype) for x in cotangents]
    (got,) = torch.autograd.grad(actual, leaf, cotangents)
    back = [reference.rope(c, -rows) for c in cotangents[:2]]
    want = torch.cat([*back, cotangents[2].double()], dim=1).transpose(1, 2)
    assert_matches("djoint", got, want, budget=10 + 4 * 22 * ANGLE / torch.finfo(got.dtype).eps)


def test_a_table_of_one_row_serves_the_batch_and_one_of_other_steps_is_an_error() -> None:
    joint, (cos, sin) = torch.randn(2, 5, 3, 4), rope_table(torch.arange(5), 4)
    for one, other in zip(
        rotate_split(joint, cos[None], sin[None], 1, 1), rotate_split(joint, cos, sin, 1, 1), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="size"):
        rotate_split(joint, cos[:4], sin[:4], 1, 1)
