"""How many operations a forward and backward pass of a mixer is: as many for any batch, and no more than so many."""

import sys
from pathlib import Path

import pytest
import torch

from helmholtz import kernels

FOLDER = Path(__file__).parents[2] / "benchmarks"
WITH_KERNELS = 120
PLAIN = {"softmax": 350, "linear": 410, "gla": 480, "rnn_softmax": 530, "mamba": 1950}
"""The first-order scan of the conditioning is in each of them; Mamba walks over the places of a chunk."""


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
        one, three = (operations.counted(layer, batch, 256).computing.total() for batch in (1, 3))
    assert one == three <= (WITH_KERNELS if form == "kernels" else PLAIN[prior])
