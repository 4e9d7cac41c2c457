"""How many operations a forward and backward pass of a mixer is: as many for any batch, and no more than so many.
Counted is all that torch dispatches below autograd, views and allocations as well."""

import sys
from pathlib import Path

import pytest
import torch

from helmholtz import kernels

FOLDER = Path(__file__).parents[2] / "benchmarks"
WITH_KERNELS = 172
PLAIN = {"softmax": 405, "linear": 470, "gla": 580, "rnn_softmax": 515, "mamba": 3400}
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
        two, three = (
            operations.counted(layer, batch, 256).all.total() for batch in (2, 3)
        )  # 1 is never copied
    assert two == three <= (WITH_KERNELS if form == "kernels" else PLAIN[prior])
