"""Which calls reach the Triton kernels, and by which route their gradients come."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from helmholtz import kernels
from helmholtz.kernels import gpu
from helmholtz.ops.triton import _shared

X = torch.rand(1, 4, 2)


def test_kernels_take_what_they_can():
    assert kernels.usable("gated_read", X, None, X.half(), X.bfloat16(), X.bool())
    assert not kernels.usable("gated_read", X.double())
    assert not kernels.usable("sample", X)
    assert not torch.func.vmap(lambda x: torch.tensor(kernels.usable("gated_read", x)))(X).any()
    with kernels.plain_forms():
        assert not kernels.usable("gated_read", X)


def test_tensors_on_a_gpu_without_triton_take_the_plain_forms(monkeypatch):
    """As here, where torch is built without one; a call of two devices is for torch to refuse."""
    assert not kernels.usable_by_triton("gated_read", [X.to("meta")])
    assert not kernels.usable_by_triton("gated_read", [X, X.to("meta")], "cpu")


@pytest.mark.parametrize("name", gpu.MODULES)
def test_every_operator_is_compiled(name):
    module = import_module(f"helmholtz.ops.triton.{gpu.MODULES[name]}")
    wanted = [x for x in (name, f"{name}_backward") if hasattr(torch.ops.helmholtz, x)]
    assert set(wanted) <= {operator for operator, _ in module.CALLS.values()}


def test_an_empty_grid_is_not_launched():
    _shared.launch(None, (0, 3))


FOUND = """
import os, sys, warnings
import torch
import interpreted
interpreted._mend()
from helmholtz import kernels
from helmholtz.kernels import gpu
from helmholtz.ops import gated_read
from helmholtz.ops.triton import _shared, gated_read as module

if not kernels.LOADED:
    sys.exit("not built")
warnings.simplefilter("ignore")  # of a kernel that takes another's place
gpu.register("CPU", with_gradients=False)
_shared.assumed = _shared.Target("cuda", 90)
calls = []
for name in ("gated_read", "gated_read_backward"):
    def spy(*x, name=name, true=getattr(module, name)):
        calls.append(name)
        return true(*x)
    setattr(module, name, spy)
x = torch.rand(2, 3, 4, 2, 5, requires_grad=True)
beta, gate = torch.rand(4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
dy = torch.randn(2, 3, 4, 5)
found = [torch.autograd.grad(gated_read(x, beta, gate), (x, beta, gate), dy)]
assert calls == ["gated_read", "gated_read_backward"], calls
with kernels.plain_forms():
    found.append(torch.autograd.grad(gated_read(x, beta, gate), (x, beta, gate), dy))
for a, b in zip(*found):
    torch.testing.assert_close(a, b)
print("alike")
"""


def test_the_compiled_librarys_gradients_call_them_too():
    """Its autograd functions look operators up by device, whoever registered one."""
    env = {k: v for k, v in os.environ.items() if k != "HELMHOLTZ_CACHE"} | {"PYTHONPATH": "tests/support"}
    done = subprocess.run([sys.executable, "-c", FOUND], capture_output=True, text=True, env=env)
    if "not built" in done.stderr:
        pytest.skip("the kernels are not built")
    assert done.stdout == "alike\n", done.stderr
