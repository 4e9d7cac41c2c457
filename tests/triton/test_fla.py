"""The calls of ``fla``'s chunk kernels, computed by the kernels themselves in triton's interpreter (other tests hand
them to a stand-in)."""

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from helmholtz.ops import _linear_fla, recurrent_linear_attention
from helpers import assert_matches, grads
from recurrence import random_reset

pytestmark = [
    pytest.mark.skipif(find_spec("fla") is None, reason="fla-core is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its imports warn of what is not there
]
BUDGET = 30  # worst measured: 10 eps


def _numbers(*bounds: Any) -> Iterator[Any]:
    """``range`` in numbers of triton, as a loop has them when it is compiled; the interpreter's are Python's."""
    from triton.runtime.interpreter import _implicit_cvt

    given = (int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds)
    return (_implicit_cvt(i) for i in range(*given))


@pytest.fixture
def fla(monkeypatch):
    """Of several configurations its autotuner takes the first: there is nothing to time them on."""
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "_bench", lambda self, *_, **__: (0.0, 0.0, 0.0))
    for module in ("fla.ops.gla", "fla.ops.simple_gla"):
        import_module(module)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            monkeypatch.setattr(module, "range", _numbers, raising=False)


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@pytest.mark.parametrize("with_reset", [False, True])
def test_its_kernels_compute_linear_attention(fla, kind, with_reset):
    batch, heads, time, keys, values = 2, 1, 70, 16, 16
    inputs = [torch.randn(batch, heads, time, n) for n in (keys, keys, values)]
    if kind != "none":
        inputs.append(-torch.rand(batch, heads, time, *([keys] if kind == "channel" else [])))
    inputs.append(torch.randn(batch, heads, keys, values))
    reset = random_reset(batch, time) if with_reset else None

    def ours(*xs):
        q, k, v, *g, state = xs
        return recurrent_linear_attention(q, k, v, *g, state=state, reset=reset)

    def theirs(*xs):
        q, k, v, *g, state = xs
        return _linear_fla.run(q, k, v, g[0] if g else None, state, reset)

    exact = [x.double() for x in inputs]
    cotangents = [torch.randn_like(x).double() for x in ours(*inputs)]
    for i, (a, e) in enumerate(zip(theirs(*inputs), ours(*exact), strict=True)):
        assert_matches(f"output {i}", a, e, budget=BUDGET)
    got, want = grads(theirs, inputs, cotangents), grads(ours, exact, cotangents)
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        assert_matches(f"gradient {i}", a, e, budget=BUDGET)
