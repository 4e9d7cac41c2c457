"""`modulated_split` against its float64 reference."""

import pytest
import torch

from helmholtz import kernels, reference
from helmholtz.ops.modulate import modulated_split
from helpers import DTYPES, assert_matches, grads

BUDGET = 2.4  # worst measured: 0.8 eps
WIDTHS = [(1,), (3, 17, 1), (5, 16, 33, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 17), (3, 40)], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_it_matches_the_reference(widths, shape, dtype, form):
    inputs = [torch.randn(*shape, sum(widths)).to(dtype) for _ in range(2)]
    actual = modulated_split(*inputs, widths)
    expected = reference.modulated_split(*inputs, widths)
    cotangents = [torch.randn(x.shape).to(dtype).double() for x in expected]
    got = grads(lambda *x: modulated_split(*x, widths), inputs, cotangents)
    want = grads(lambda *x: reference.modulated_split(*x, widths), inputs, cotangents)
    every_step = form == "plain" or dtype == torch.float16  # is rounded
    budget = 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if every_step else BUDGET
    for a, e in zip((*actual, *got), (*expected, *want), strict=True):
        assert a.dtype == dtype
        assert_matches("parts and gradients", a, e, budget=max(BUDGET, budget))


def test_a_part_that_nobody_reads_and_gradients_that_lie_anywhere():
    """Heads before time, one number for all, and a part without any."""
    joint, scale = (torch.randn(2, 6, 9).requires_grad_() for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (joint, scale)]

    def loss(parts):
        heads = parts[0].unflatten(-1, (2, 2)).transpose(1, 2).contiguous()
        return heads.square().sum() + parts[1].sum()

    got = torch.autograd.grad(loss(modulated_split(joint, scale, [4, 3, 2])), (joint, scale))
    want = torch.autograd.grad(loss(reference.modulated_split(*wide, [4, 3, 2])), wide)
    for a, e in zip(got, want, strict=True):
        assert_matches("gradients", a, e, budget=BUDGET)
        assert not a[..., 7:].any()


def test_two_dtypes_meet_in_the_wider_and_slices_are_read_as_they_lie():
    joint, scale = torch.randn(2, 5, 14)[..., 3:11], torch.randn(2, 5, 8).bfloat16()
    parts = modulated_split(joint, scale, [5, 3])
    for a, e in zip(parts, reference.modulated_split(joint, scale, [5, 3]), strict=True):
        assert_matches("parts", a, e, budget=BUDGET)


def test_no_token_gives_none(form):
    shapes = [x.shape for x in modulated_split(torch.ones(2, 0, 4), torch.ones(2, 0, 4), [1, 3])]
    assert shapes == [(2, 0, 1), (2, 0, 3)]
    assert form == "plain" or kernels.usable("modulate")
