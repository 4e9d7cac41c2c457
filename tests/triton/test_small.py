"""The element-wise kernels over several of their blocks; more of them is in tests/ops."""

import pytest
import torch

from helmholtz import reference
from helmholtz.ops.free_energy import tilt_values
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.modulate import modulated_split
from helmholtz.ops.triton import gated_read as gated_module
from helmholtz.ops.triton import modulate as modulate_module
from helmholtz.ops.triton import tilt as tilt_module
from helpers import assert_matches, grads

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(gated_module, "NUMBERS", 64)
    monkeypatch.setattr(gated_module, "NUMBERS_BACKWARD", 64)
    monkeypatch.setattr(tilt_module, "NUMBERS", 32)
    monkeypatch.setattr(modulate_module, "ROWS", 4)
    monkeypatch.setattr(modulate_module, "BLOCK", 16)


def assert_alike(op, twin, inputs, *, budget):
    got, want = op(*inputs), twin(*(x.double() for x in inputs))
    cotangents = [torch.randn(x.shape).to(got[0].dtype).double() for x in want]  # as outputs hold them
    pairs = zip(
        [*got, *grads(op, inputs, cotangents)], [*want, *grads(twin, inputs, cotangents)], strict=True
    )
    for i, (a, e) in enumerate(pairs):
        assert_matches(str(i), a, e, budget=budget)


@every_dtype
def test_a_scaled_projection(dtype):
    inputs = [torch.randn(2, 7, 41).to(dtype) for _ in range(2)]
    twin = reference.modulated_split
    assert_alike(*(lambda *x, f=f: f(*x, [33, 1, 7]) for f in (modulated_split, twin)), inputs, budget=4)


@every_dtype
@pytest.mark.parametrize("signals_first", [True, False])
def test_a_tilt_wider_than_a_block(dtype, signals_first):
    v, beta = (2 * torch.randn(2, 3, 5, 37)).to(dtype), torch.rand(3, 37) + 0.5

    def twin(v, beta):
        v, beta = v.double(), beta.double().unsqueeze(1)
        return [torch.stack([v, (beta * v).clamp(-1.5, 1.5).exp()], dim=-2)]

    assert_alike(
        lambda *x: [tilt_values(*x, cap=1.5, signals_first=signals_first)], twin, (v, beta), budget=8
    )


@every_dtype
@pytest.mark.parametrize("blind", [False, True])
def test_a_gated_read(dtype, blind):
    mixed = torch.rand(2, 7, 3, 2, 5) + 0.5
    if blind:
        mixed[0, 2, 1], mixed[1, 6, 2] = 0, 0
    gates = [
        torch.randn(2, 7, 3, 5).to(dtype),
        torch.randn(2, 7, 15).to(dtype),
        torch.randn(2, 7, 3, 5).to(dtype),
    ]
    inputs = [mixed, torch.rand(3, 5) + 0.5, *gates]

    def twin(mixed, beta, inner, outer, own):
        heads = mixed[..., 0, :].shape
        inner, outer, own = (x.reshape(heads) for x in (inner, outer, own))
        mean, partition = mixed.double().unbind(-2)
        free = torch.where(partition > 0, partition, 1.0).log() / beta.double()
        read = mean + inner.double().sigmoid() * (free - mean)
        for x, eps in ((outer, 0.0), (own, torch.finfo(torch.float32).eps)):
            u = torch.nn.functional.softplus(x.double()) + 1e-6
            read = read * u / (u.square().mean(-1, keepdim=True) + eps).sqrt()
        return [read]

    assert_alike(lambda *x: [gated_read(*x)], twin, inputs, budget=16)
