"""The softmax average against its reference: masks, packing, grouped heads, unequal widths, streams."""

import pytest
import torch

from helmholtz.ops.attention import softmax_attention
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads

# B, H, G, T, S, K, V: odd widths, one head per group and several, fewer queries than keys
SHAPES = [(1, 1, 1, 1, 1, 2, 1), (2, 3, 3, 7, 7, 5, 8), (2, 4, 2, 9, 9, 6, 3), (1, 6, 1, 4, 33, 3, 3)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape, dtype=torch.float32):
    b, h, g, t, s, k, v = shape
    return tuple(torch.randn(size).to(dtype) for size in [(b, h, t, k), (b, g, s, k), (b, g, s, v)])


def key_mask(shape):
    """Random pads; the first key is one, so that the first queries of a causal sequence see nothing."""
    mask = torch.rand(shape[0], shape[4]) > 0.4
    mask[:, 0] = shape[4] == 1
    return mask


def assert_equal_to_reference(inputs, budget=8, **options):
    def run(fn):
        return lambda *args: [fn(*args, **options)]

    assert_matches(
        "out",
        softmax_attention(*inputs, **options),
        reference.softmax_attention(*inputs, **options),
        budget=budget,
    )
    cotangents = [torch.randn_like(softmax_attention(*inputs, **options)).double()]
    got, want = (
        grads(run(fn), inputs, cotangents) for fn in (softmax_attention, reference.softmax_attention)
    )
    for name, a, b in zip(["dq", "dk", "dv"], got, want, strict=True):
        assert_matches(name, a, b, budget=2 * budget)


@every_shape
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_and_gradients_match_the_reference(shape, causal, masked, dtype):
    options = {"causal": causal, "key_mask": key_mask(shape) if masked else None}
    assert_equal_to_reference(problem(shape, dtype), **options)


@every_shape
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
def test_narrow_dtypes_stay_within_their_rounding(shape, dtype):
    """Attention proper may round the weights to the narrow dtype; the free-energy read widens first."""
    inputs = problem(shape, dtype)
    out, expected = softmax_attention(*inputs), reference.softmax_attention(*inputs)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in problem((1, 4, 2, 3, 5, 4, 3), torch.float64))
    mask = torch.tensor([[False, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda q, k, v: softmax_attention(q, k, v, key_mask=mask), (q, k, v))


def test_fewer_queries_are_the_last_positions():
    q, k, v = problem((2, 3, 3, 9, 9, 4, 5))
    whole = softmax_attention(q, k, v)
    for start in (1, 5, 8):
        torch.testing.assert_close(softmax_attention(q[:, :, start:], k, v), whole[:, :, start:])


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_keys_is_zero_and_passes_no_gradient(causal):
    inputs = tuple(x.requires_grad_() for x in problem((2, 2, 1, 5, 5, 4, 3)))
    mask = torch.tensor([[False, False, True, True, False], [False] * 5])
    out = softmax_attention(*inputs, causal=causal, key_mask=mask)
    blind = torch.tensor([[causal, causal, False, False, False], [True] * 5])
    assert (out.transpose(1, 2)[blind] == 0).all() and (out[0, :, 2:] != 0).any()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), inputs)
    assert (dq.transpose(1, 2)[blind] == 0).all()
    assert all(g.isfinite().all() and (g[0, :, :2] == 0).all() and (g[1] == 0).all() for g in (dk, dv))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_separate(causal):
    q, k, v = problem((1, 4, 2, 12, 12, 4, 6))
    bounds = torch.tensor([0, 1, 7, 12])
    packed = softmax_attention(q, k, v, causal=causal, cu_seqlens=bounds)
    for a, b in [(0, 1), (1, 7), (7, 12)]:
        alone = softmax_attention(*(x[:, :, a:b] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(packed[:, :, a:b], alone)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="k: 2 key/value heads do not divide 3"):
        softmax_attention(*problem((1, 3, 2, 4, 4, 2, 2)))
    with pytest.raises(ValueError, match="q: 5 causal queries .* 4 keys"):
        softmax_attention(*problem((1, 1, 1, 5, 4, 2, 2)))
    with pytest.raises(ValueError, match="backend must be one of .*flash_attn.*got 'triton'"):
        softmax_attention(*problem(SHAPES[1]), backend="triton")
    with pytest.raises(ValueError, match="'flash_attn' cannot run this call: it needs CUDA tensors.*cpu"):
        softmax_attention(*problem(SHAPES[1]), backend="flash_attn")


@pytest.mark.parametrize("masked", [False, True])
def test_huge_future_keys_change_no_bit_of_the_past(masked):
    q, k, v = problem((1, 2, 2, 700, 700, 8, 8))
    mask = key_mask((1, 2, 2, 700, 700)) if masked else None
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 350:] *= 1e4
    v2[:, :, 350:] = 1e30
    before, after = softmax_attention(q, k, v, key_mask=mask), softmax_attention(q, k2, v2, key_mask=mask)
    assert torch.equal(before[:, :, :350], after[:, :, :350]) and not torch.equal(before, after)
