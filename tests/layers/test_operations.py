"""How many operations a forward and backward pass of a mixer is: as many for any batch, and no more than so many.
Counted is all that torch dispatches below autograd, views and allocations as well."""

import sys
from pathlib import Path

import pytest
import torch

from helmholtz import kernels
from helmholtz.layers import FreeEnergyMixer, FreeEnergyMixerConfig

FOLDER = Path(__file__).parents[2] / "benchmarks"
WITH_KERNELS = 120
PLAIN = {"softmax": 285, "linear": 325, "gla": 420, "rnn_softmax": 400, "mamba": 1600}
"""The first-order scan of the conditioning is in each of them; Mamba walks over the places of a chunk."""
ANOTHER_LEVEL, PART = 60, 60
"""Of a scan of more than 256 steps, and of 256 queries that the softmax prior reads apart."""


@pytest.fixture
def operations(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER / "layers"), *sys.path])
    import operations

    yield operations
    for name in ("operations", "speed", "_timing"):
        del sys.modules[name]


@pytest.mark.parametrize("form", ["kernels", "plain"])
@pytest.mark.parametrize("prior", PLAIN)
def test_operations_of_a_mixer(operations, prior, form):
    if form == "kernels" and not kernels.LOADED:
        pytest.skip("the kernels are not built")
    torch.manual_seed(0)
    layer = operations.mixer(prior)
    with operations.FORMS[form]():
        two, three = (
            operations.counted(layer, batch, 256).all.total() for batch in (2, 3)
        )  # 1 is never copied
    assert two == three <= (WITH_KERNELS if form == "kernels" else PLAIN[prior])


@pytest.mark.parametrize("prior", PLAIN)
def test_operations_grow_by_levels_and_parts_alone(operations, prior):
    """Eight times the tokens and four times the batch."""
    layer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=16, n_heads=2, prior=prior))
    with kernels.plain_forms():
        short, long = (
            operations.counted(layer, batch, time, 16).all.total() for batch, time in ((2, 256), (8, 2048))
        )
    assert short < long <= short + 2 * ANOTHER_LEVEL + (8 * PART if prior == "softmax" else 0)
