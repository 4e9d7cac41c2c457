"""The averages that a free-energy read takes the logarithm of, against their reference, around the ends of blocks."""

import pytest
import torch

from helmholtz import kernels
from helmholtz.ops.free_energy import softmax_read, softmax_step
from helmholtz.ops.rope import rope_table
from helmholtz.reference import free_energy as reference
from helmholtz.reference import rope
from helpers import assert_matches, grads

# B, H, G, T, S, K, V: around blocks of 64 queries, 256 keys, 64 values, queries of a stream, odd widths, grouped heads
SHAPES = [(2, 3, 3, 1, 33, 16, 16), (1, 6, 2, 1, 9, 7, 3), (2, 4, 2, 70, 70, 5, 8), (1, 2, 1, 130, 261, 8, 17),
          (1, 1, 1, 7, 513, 33, 1), (1, 2, 2, 257, 257, 4, 33), (1, 2, 1, 9, 66, 3, 131)]  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
NAMES = ["dq", "dk", "dv", "dbeta"]


def problem(shape, dtype=torch.float32, scale=1.0):
    """Queries, keys and values as slices of one projection: tokens before heads."""
    b, h, g, t, s, k, v = shape
    q = torch.randn(b, t, h * k + 1).to(dtype)[..., 1:].unflatten(-1, (h, k)).transpose(1, 2)
    both = (scale * torch.randn(b, s, g * (k + v))).to(dtype)
    keys, values = both.split([g * k, g * v], dim=-1)
    beta = (torch.rand(g, v) + 0.5).to(torch.promote_types(dtype, torch.float32))
    return q, *(x.unflatten(-1, (g, -1)).transpose(1, 2) for x in (keys, values)), beta


def assert_read(inputs, *, budget=8, **options):
    options = {"cap": 40.0} | options
    both = [lambda *x, fn=fn: [fn(*x, **options)] for fn in (softmax_read, reference.softmax_read)]
    (actual,), (expected,) = (fn(*inputs) for fn in both)
    for n, name in enumerate(["mean", "partition"]):
        assert_matches(name, actual[..., n, :], expected[..., n, :], budget=budget)
    cotangents = [torch.randn_like(actual).double()]
    for name, got, want in zip(NAMES, *(grads(fn, inputs, cotangents) for fn in both), strict=True):
        assert_matches(name, got, want, budget=4 * budget)


@every_shape
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_averages_and_gradients_match_the_reference(shape, causal, masked, dtype):
    mask = None
    if masked:
        mask = torch.rand(shape[0], shape[4]) > 0.4
        mask[:, 0] = False  # the first queries of a causal sequence see nothing
    assert_read(problem(shape, dtype), causal=causal, key_mask=mask)


def test_the_clip_has_no_gradient_beyond_it():
    assert_read(problem(SHAPES[3], torch.float64), cap=0.7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 1, 33, 64, 300], [0, 257, 259, 300]], ids=str)
def test_packed_sequences_are_read_alone(causal, bounds):
    inputs = [x.requires_grad_() for x in problem((1, 4, 2, 300, 300, 4, 5), torch.float64)]
    packed = softmax_read(
        *inputs, cap=40.0, causal=causal, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )
    *qkv, beta = inputs
    parts = [[x[:, :, a:b] for x in qkv] for a, b in zip(bounds, bounds[1:], strict=False)]
    alone = torch.cat([softmax_read(*part, beta, cap=40.0, causal=causal) for part in parts], dim=2)
    torch.testing.assert_close(packed, alone)
    cotangent = torch.randn_like(packed)
    for got, want in zip(*(torch.autograd.grad(x, inputs, cotangent) for x in (packed, alone)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("beta", [1e-3, 2e-3, 0.05, 1.0, 5.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_in_bf16_the_free_energy_stays_within_its_bound(beta, shift):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    q, k, v = (2 * q).bfloat16(), k.bfloat16(), (v + shift).bfloat16()
    rate = torch.full((2, 16), beta)
    mixed, exact = (fn(q, k, v, rate, cap=40.0) for fn in (softmax_read, reference.softmax_read))
    assert mixed.dtype == torch.float32
    mean, free = mixed[..., 0, :].double(), mixed[..., 1, :].double().log() / beta
    seen = v.double().cummax(2).values - v.double().cummin(2).values
    assert ((free - exact[..., 1, :].log() / beta).abs() <= 2**-8 * (free.abs() + seen)).all()
    assert ((mean - exact[..., 0, :]).abs() <= 2**-8 * (mean.abs() + seen)).all()


@every_shape
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_bf16_stay_within_its_rounding(shape, masked):
    inputs = problem(shape, torch.bfloat16)
    mask = torch.rand(shape[0], shape[4]) > 0.4 if masked else None
    options = {"cap": 40.0, "key_mask": mask}
    both = [lambda *x, fn=fn: [fn(*x, **options)] for fn in (softmax_read, reference.softmax_read)]
    cotangents = [torch.randn_like(both[0](*inputs)[0]).double()]
    for name, got, want in zip(NAMES, *(grads(fn, inputs, cotangents) for fn in both), strict=True):
        assert (got.double() - want).abs().max() <= 2 * 2**-7 * want.abs().max(), name


def test_what_lies_ahead_changes_no_bit():
    q, k, v, beta = problem((1, 2, 2, 300, 300, 8, 8))
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 150:] *= 1e4
    v2[:, :, 150:] = 1e30
    before, after = softmax_read(q, k, v, beta, cap=40.0), softmax_read(q, k2, v2, beta, cap=40.0)
    assert torch.equal(before[:, :, :150], after[:, :, :150]) and not torch.equal(before, after)


@pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_neighbours_change_no_bit(dtype, form):
    if form == "plain":
        return
    q, k, v, beta = (x.detach().requires_grad_() for x in problem((2, 4, 2, 300, 300, 8, 9), dtype))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        mixed = softmax_read(q, k, v, beta, cap=40.0)
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), (q, k, v, beta))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    alone = softmax_read(q[:1], k[:1], v[:1], beta, cap=40.0)
    assert torch.equal(alone, found[0][0][:1])
    stream = softmax_read(q[:, :, -99:], k, v, beta, cap=40.0)
    torch.testing.assert_close(stream, found[0][0][:, :, -99:])


def in_steps(q, k, v, beta, rotation, lengths, cap, mask):
    """The whole by steps of these lengths, in memory that is longer than it needs to be."""
    (batch, time, _), (groups, width) = q.shape, beta.shape
    keys = q.new_full((batch, groups, time + 3, k.shape[2] // groups), torch.nan)
    values = q.new_full((batch, groups, time + 3, width), torch.nan)
    before, parts = 0, []
    for n in lengths:
        here = slice(before, before + n)
        parts.append(
            softmax_step(
                q[:, here], k[:, here], v[:, here], beta, tuple(x if x is None else x[..., here, :] for x in rotation),
                keys, values, before=before, cap=cap, key_mask=None if mask is None else mask[:, : before + n],
            )
        )  # fmt: skip
        before += n
    assert keys[:, :, before:].isnan().all() and values[:, :, before:].isnan().all()
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", ["none", "shared", "by row"])
@pytest.mark.parametrize("cap", [40.0, 0.5])
@torch.no_grad()
def test_steps_of_a_stream_are_the_whole(dtype, masked, positions, cap):
    """Four heads of 6 on two of 6 and 3; joint features as slices of one projection."""
    joint = torch.randn(3, 9, 43).to(dtype)[..., 1:]
    q, k, v = joint.split([24, 12, 6], dim=-1)
    beta = torch.rand(2, 3, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    places = torch.arange(9)
    if positions == "by row":
        places = places + torch.tensor([[0], [5], [40]])
    rotation = (None, None) if positions == "none" else rope_table(places, 6)
    mask = torch.rand(3, 9) < 0.6 if masked else None
    got = in_steps(q, k, v, beta, rotation, [1, 1, 5, 1, 1], cap, mask)
    heads = [x.double().unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, 4), (k, 2), (v, 2))]
    if positions != "none":
        heads[:2] = (rope(x, places.expand(3, -1)) for x in heads[:2])
    want = reference.softmax_read(*heads, beta.double(), cap=cap, key_mask=mask)
    # angles are float32, and rotated queries and keys are rounded to the dtype of the memory
    tolerance = (
        16 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5 if positions == "by row" else 1e-6
    )
    assert got.dtype == beta.dtype and (got - want).abs().max() < tolerance * want.abs().max()


@torch.no_grad()
def test_steps_without_a_tilt_average_the_values():
    q, k, v = torch.randn(2, 9, 24), torch.randn(2, 9, 12), torch.randn(2, 9, 6)
    keys, values = torch.zeros(2, 2, 9, 6), torch.zeros(2, 2, 9, 3)
    rotation = rope_table(torch.arange(9), 6)
    got = softmax_step(q, k, v, None, rotation, keys, values, before=0, cap=40.0)
    with_tilt = softmax_step(q, k, v, torch.ones(2, 3), rotation, keys, values, before=0, cap=40.0)
    torch.testing.assert_close(got, with_tilt[..., :1, :])


@torch.no_grad()
@pytest.mark.parametrize("before", [4, 5])
def test_a_step_beyond_the_memory_is_refused(before):
    q, k, v = torch.randn(1, 2, 8), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    memory = torch.zeros(2, 1, 1, 5, 4)
    with pytest.raises(ValueError, match="keys"):
        softmax_step(q, k, v, torch.ones(1, 4), (None, None), *memory, before=before, cap=40.0)
    assert not memory.any()
