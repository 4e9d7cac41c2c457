"""The bound of the spectral norm: above it, close to it, and a smooth function of the matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz import ops, reference
from helpers import assert_matches


def _matrix(e, d, decay, seed, dtype=torch.float64):
    """Singular values from all equal (decay 0) to one that dominates."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (e, d))
    rank = min(e, d)
    values = torch.exp(-decay * torch.arange(rank).double())
    return (left[:, :rank] * values @ right[:, :rank].T).to(dtype)


@given(
    e=st.integers(1, 70), d=st.integers(1, 70), decay=st.sampled_from([0.0, 0.01, 0.5, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_never_below_and_at_most_three_percent_above(e, d, decay, dtype, scale, seed):
    weight = _matrix(e, d, decay, seed, dtype) * scale
    norm = torch.linalg.matrix_norm(weight.double(), 2).item()
    bound = ops.spectral_norm_bound(weight)
    assert bound.shape == (1,) and bound.dtype == dtype
    assert norm <= bound.item() <= 1.03 * norm
    assert_matches("bound", bound, reference.spectral_norm_bound(weight), budget=5 * min(e, d) ** 0.5)


def test_wide_and_large():
    for shape in ((512, 512), (1500, 200), (200, 1500)):
        weight = torch.randn(shape)
        norm = torch.linalg.matrix_norm(weight.double(), 2).item()
        assert norm <= ops.spectral_norm_bound(weight).item() <= 1.03 * norm


def test_more_squarings_come_closer():
    weight = _matrix(40, 30, 0.0, 0)
    bounds = [ops.spectral_norm_bound(weight, squarings=k).item() for k in range(9)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(30**0.25, rel=1e-12) and bounds[8] == pytest.approx(1.0, abs=4e-3)


def test_homogeneous():
    weight = torch.randn(9, 14)
    bound = ops.spectral_norm_bound(weight)
    for scale in (2.0**-60, 2.0**60, -1.0):
        assert torch.equal(ops.spectral_norm_bound(scale * weight), abs(scale) * bound)


def test_zero_matrix():
    weight = torch.zeros(3, 5, requires_grad=True)
    bound = ops.spectral_norm_bound(weight)
    assert bound.item() == 0
    (slope,) = torch.autograd.grad(bound, weight)
    assert torch.equal(slope, torch.zeros(3, 5))


def test_gradient():
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.spectral_norm_bound, weight)
    (slope,) = torch.autograd.grad(ops.spectral_norm_bound(weight), weight)
    (expected,) = torch.autograd.grad(reference.spectral_norm_bound(weight), weight)
    torch.testing.assert_close(slope, expected)


def test_the_same_under_autocast():
    weight = torch.randn(20, 20)
    expected = ops.spectral_norm_bound(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.spectral_norm_bound(weight), expected)
    assert ops.spectral_norm_bound(weight.bfloat16()).dtype == torch.float32


def test_squarings_are_checked():
    with pytest.raises(ValueError, match="squarings must be an integer of at least 0, got -1"):
        ops.spectral_norm_bound(torch.eye(2), squarings=-1)
