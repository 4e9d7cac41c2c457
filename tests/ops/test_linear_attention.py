"""`linear_attention` against its float64 loop: every decay, both forms, both backends."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helmholtz import reference
from helmholtz.ops import _linear_fla
from helmholtz.ops.linear_attention import linear_attention, linear_average, recurrent_linear_attention
from helpers import DTYPES, assert_matches, grads
from recurrence import Recurrence, RecurrenceTests, check_reference, random_reset

BUDGET = 6.0  # worst measured: 1.9 eps (relative RMS over outputs, states and gradients)
HEADS, KEY, VALUE = 2, 6, 5


def _decay(kind, batch, time, strength=1.0):
    """Some steps decay not at all, most mildly, a few beyond any memory."""
    shape = {"head": (batch, HEADS, time), "channel": (batch, HEADS, time, KEY)}[kind]
    decay = -strength * torch.rand(shape)
    decay[:, :, time // 3 :: 7] = 0.0
    decay[:, :1, time // 2 :: 11] = -1e4
    return decay


def _call(f):
    def call(inputs, state, reset):
        return f(*inputs, state=None if state is None else state[0], reset=reset)

    return call


def _problem(op, kind):
    def make(batch, time):
        q, k = torch.randn(2, batch, HEADS, time, KEY)
        decays = [] if kind == "none" else [_decay(kind, batch, time)]
        return [q, k, torch.randn(batch, HEADS, time, VALUE), *decays]

    return Recurrence(
        op=_call(op),
        oracle=_call(reference.linear_attention),
        make=make,
        make_state=lambda batch: [torch.randn(batch, HEADS, KEY, VALUE)],
        time=(2,) * (3 if kind == "none" else 4),
        out_time=2,
    )


CHUNKED = {kind: _problem(linear_attention, kind) for kind in ("none", "head", "channel")}
PROBLEMS = {**CHUNKED, "recurrent": _problem(recurrent_linear_attention, "channel")}
every_kind = pytest.mark.parametrize("kind", ["head", "channel"])


class TestRecurrence(RecurrenceTests):
    problems = PROBLEMS
    budget = BUDGET


def _average(*inputs, **options):
    out, last = linear_average(*inputs, **options)
    return out.to(inputs[2].dtype), last


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@pytest.mark.parametrize("shape", [(2, 63), (1, 64), (2, 65), (1, 130)])
def test_averages_are_sums_over_those_of_ones(shape, kind, dtype):
    """Positive features and more value columns than a vector holds."""

    def make(batch, time):
        q, k = torch.rand(2, batch, HEADS, time, KEY) + 0.1
        v = torch.randn(batch, time, HEADS, 33).transpose(1, 2)
        return [q, k, v, *([] if kind == "none" else [_decay(kind, batch, time)])]

    problem = replace(
        CHUNKED[kind],
        op=_call(_average),
        oracle=_call(reference.linear_average),
        make=make,
        make_state=lambda batch: [torch.rand(batch, HEADS, KEY, 34)],
    )
    # worst measured: 7.8 eps, of float64, where the reference rounds as much: a quotient's gradient cancels
    check_reference(problem, shape, dtype, with_reset=True, budget=12.0)


def test_an_average_of_nothing_is_0_with_gradient_0():
    q, k, v = (x.requires_grad_() for x in CHUNKED["none"].make(1, 5))
    out, _ = linear_average(q, 0 * k, v)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 128, 1024])
def test_chunk_size_does_not_matter(kind, chunk_size):
    inputs, reset = CHUNKED[kind].make(2, 150), random_reset(2, 150)
    state = torch.randn(2, HEADS, KEY, VALUE)

    def run(*xs, size=chunk_size):
        return linear_attention(*xs[1:], state=xs[0], reset=reset, chunk_size=size)

    leaves = [state, *inputs]
    outputs = run(*leaves, size=64)
    for i, (a, e) in enumerate(zip(run(*leaves), outputs, strict=True)):
        assert_matches(f"output {i}", a, e, budget=BUDGET)
    cotangents = [torch.randn_like(x) for x in outputs]
    want = grads(lambda *xs: run(*xs, size=64), leaves, cotangents)
    for i, (a, e) in enumerate(zip(grads(run, leaves, cotangents), want, strict=True)):
        assert_matches(f"gradient {i}", a, e, budget=BUDGET)


@every_kind
@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -0.2, -5.0, -60.0, -1e4])
def test_any_decay_is_exact_over_a_long_sequence(kind, log_decay):
    """A clamp on the summed decay, or a quotient of its exponentials, is wrong from a few hundred steps on."""
    time = 2048
    k, v = torch.zeros(1, 1, time, 2), torch.ones(1, 1, time, 1)
    k[:, :, 5] = 1.0
    decay = torch.full((1, 1, time) if kind == "head" else (1, 1, time, 2), log_decay)
    out, state = linear_attention(torch.ones_like(k), k, v, decay)
    age = torch.arange(time).double() - 5
    want = torch.where(age >= 0, 2 * (log_decay * age).exp(), 0.0)
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(
        out[0, 0, :, 0].double(), want, rtol=2e-4, atol=tiny
    )  # 2048 factors, eps / 2 each
    torch.testing.assert_close(state[0, 0, :, 0].double(), (want[-1] / 2).expand(2), rtol=2e-4, atol=tiny)


@every_kind
def test_minus_infinity_forgets(kind):
    q, k, v, decay = CHUNKED[kind].make(1, 100)
    decay[:, :, 37] = -torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v, decay)]
    out, _ = linear_attention(*leaves)
    want, _ = linear_attention(*(x[:, :, 37:] for x in (q, k, v, decay)))
    assert_matches("out", out[:, :, 37:], want, budget=BUDGET)
    for g in torch.autograd.grad(out.square().sum(), leaves):
        assert g.isfinite().all()


@every_kind
def test_gradient_of_a_strong_decay_has_no_noise(kind):
    """Only pairs on both sides of a step enter its gradient: where all are forgotten it vanishes, not just nearly."""
    q, k, v, _ = CHUNKED[kind].make(1, 96)
    decay = torch.full((1, HEADS, 96) if kind == "head" else (1, HEADS, 96, KEY), -60.0, requires_grad=True)
    out, _ = linear_attention(q, k, v, decay)
    (g,) = torch.autograd.grad(out.square().sum(), decay)
    assert g.abs().max() < 1e-20


@given(
    time=st.integers(1, 140),
    key=st.integers(1, 5),
    value=st.integers(1, 5),
    kind=st.sampled_from([None, "head", "channel"]),
    strength=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_any_widths(time, key, value, kind, strength):
    q, k = torch.rand(2, 1, 2, time, key)
    v = torch.rand(1, 2, time, value)  # of one sign: no cancellation in small outputs
    shape = {None: None, "head": (1, 2, time), "channel": (1, 2, time, key)}[kind]
    decay = None if shape is None else -strength * torch.rand(shape)
    actual, expected = linear_attention(q, k, v, decay), reference.linear_attention(q, k, v, decay)
    for name, a, e in zip("oS", actual, expected, strict=True):
        assert_matches(name, a, e, budget=6.6)  # worst measured: 2.2 eps


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
def test_nothing_of_size_time_times_key_times_value(kind):
    time, key, value = 512, 32, 32
    q, k, v = (torch.randn(1, 1, time, 32, requires_grad=True) for _ in range(3))
    decay = {"none": None, "head": -torch.rand(1, 1, time), "channel": -torch.rand(1, 1, time, key)}[kind]
    with _Largest() as largest:
        linear_attention(q, k, v, decay)[0].sum().backward()
    assert largest.numel <= 2 * 4 * time * (key + value)


@pytest.mark.parametrize("chunk_size", [0, 48, -64])
def test_chunk_size_must_be_a_power_of_two(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a power of two"):
        linear_attention(*CHUNKED["none"].make(1, 3), chunk_size=chunk_size)


@pytest.fixture
def fla(monkeypatch):
    """A stand-in for ``fla`` that records what it is handed and computes it one sequence after another."""
    calls = []

    def kernel(name):
        def run(q, k, v, *, g, scale, initial_state, output_final_state, cu_seqlens):
            calls.append({"name": name, "q": q, "g": g, "scale": scale, "cu_seqlens": cu_seqlens})
            assert output_final_state and initial_state.dtype == torch.float32
            time = q.shape[1]
            bounds = [0, time] if cu_seqlens is None else cu_seqlens.tolist()
            rows = [None if x is None else x.transpose(1, 2) for x in (q * scale, k, v, g)]
            outs, states = [], []
            for n, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False)):
                cut = [None if x is None else x[:, :, i:j] for x in rows]
                start = initial_state if cu_seqlens is None else initial_state[n : n + 1]
                out, last = recurrent_linear_attention(*cut, state=start)
                outs.append(out.transpose(1, 2))
                states.append(last)
            return torch.cat(outs, 1), torch.cat(states)

        return run

    for module, kernels in {
        "fla": [],
        "fla.ops": [],
        "fla.ops.simple_gla": ["chunk_simple_gla"],
        "fla.ops.gla": ["chunk_gla"],
    }.items():
        stub = ModuleType(module)
        stub.__spec__ = ModuleSpec(module, None)
        for name in kernels:
            setattr(stub, name, kernel(name))
        monkeypatch.setitem(sys.modules, module, stub)
    return calls


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_fla_is_handed_its_own_layout(fla, kind, with_reset, with_state):
    inputs, reset = CHUNKED[kind].make(2, 33), random_reset(2, 33) if with_reset else None
    call = [*inputs, *([None] if kind == "none" else [])]
    leaves = [*inputs, *([torch.randn(2, HEADS, KEY, VALUE)] if with_state else [])]

    def run(*xs):
        q, k, v, *rest = xs
        decay = None if kind == "none" else rest.pop(0)
        return _linear_fla.run(q, k, v, decay, rest[0] if rest else None, reset)

    def torch_path(*xs):
        q, k, v, *rest = xs
        decay = None if kind == "none" else rest.pop(0)
        return linear_attention(q, k, v, decay, state=rest[0] if rest else None, reset=reset)

    outputs, expected = run(*leaves), torch_path(*leaves)
    (seen,) = fla
    rows, time = (1, 66) if with_reset else (2, 33)
    assert seen["name"] == ("chunk_gla" if kind == "channel" else "chunk_simple_gla")
    assert seen["q"].shape == (rows, time, HEADS, KEY)
    assert seen["scale"] == 1.0
    if kind == "none":
        assert seen["g"] is None
    else:
        assert seen["g"].shape == (rows, time, *call[3].transpose(1, 2).shape[2:])
        assert seen["g"].dtype == torch.float32
    if reset is None:
        assert seen["cu_seqlens"] is None
    else:
        starts = sorted({0, 33, *reset.flatten().nonzero().flatten().tolist()})
        assert seen["cu_seqlens"].tolist() == [*starts, 66]
    for i, (a, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_matches(f"output {i}", a, e, budget=BUDGET)
    cotangents = [torch.randn_like(x) for x in outputs]
    for i, (a, e) in enumerate(
        zip(grads(run, leaves, cotangents), grads(torch_path, leaves, cotangents), strict=True)
    ):
        assert_matches(f"gradient {i}", a, e, budget=BUDGET)


def test_fla_is_left_alone_with_cpu_tensors(fla):
    inputs = CHUNKED["head"].make(1, 20)
    out, _ = linear_attention(*inputs)
    assert not fla
    assert_matches("out", out, reference.linear_attention(*inputs)[0], budget=BUDGET)
    with pytest.raises(
        ValueError, match="'fla' cannot run this call: it needs CUDA tensors, these are on cpu"
    ):
        linear_attention(*inputs, backend="fla")


class _OnCuda(torch.Tensor):
    """Looks like a CUDA tensor to the check that decides who runs."""

    device = property(lambda _: torch.device("cuda"))


def _on_cuda(dtype, time=4):
    return torch.zeros(1, 2, time, 8, dtype=dtype).as_subclass(_OnCuda)


def test_fla_says_why_it_refuses(fla, monkeypatch):
    def reason(q, k, v):
        return _linear_fla.refuses(q, k, v, None, None, None)

    half, single, double = (_on_cuda(d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert reason(half, half, half) is None
    assert "TF32" in reason(single, single, single)
    assert "float64" in reason(double, double, double)
    assert "one dtype" in reason(half, single, half)
    assert "empty" in reason(half, half, _on_cuda(torch.bfloat16, time=0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert reason(single, single, single) is None
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in reason(half, half, half)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'fla', 'torch'\], got 'triton'"):
        linear_attention(*CHUNKED["none"].make(1, 3), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["none", "head", "channel"])
def test_cuda_matches_reference(kind):
    inputs, reset = CHUNKED[kind].make(2, 130), random_reset(2, 130)
    actual = linear_attention(*(x.cuda() for x in inputs), reset=reset.cuda(), backend="torch")
    for a, e in zip(actual, reference.linear_attention(*inputs, reset=reset), strict=True):
        assert_matches("on CUDA", a.cpu(), e, budget=BUDGET)
