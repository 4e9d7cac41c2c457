"""The guards of conftest.py do guard."""

import os

import pytest
import torch

from helmholtz.ops.rope import rope


def test_uninitialised_memory_is_nan():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert torch.empty(3, requires_grad=True).isnan().all()
    assert torch.empty(2, dtype=torch.long).shape == (2,)


@pytest.mark.skipif(os.environ.get("SHAPE_CHECKS") == "0", reason="the shape checks are off")
def test_shapes_are_checked():
    with pytest.raises(TypeError, match="rope"):
        rope(torch.zeros(2, 3, 4), torch.arange(3))


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_test_starts_from_the_same_seed(attempt):
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
