"""The softmax average against its reference: masks, packing, grouped heads, unequal widths, streams."""

import sys
import types

import pytest
import torch

from helmholtz.ops import attention
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


def test_padded_widths_change_nothing_and_avoid_the_quadratic_path(monkeypatch):
    """Equal widths are what SDPA's linear-memory kernel takes; the scale stays that of the true key width."""
    widths = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1], options["scale"]))
        return original(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for k_width, v_width in [(4, 9), (9, 4), (5, 5)]:
        assert softmax_attention(*problem((1, 2, 2, 6, 6, k_width, v_width))).shape[-1] == v_width
        assert widths.pop() == (*[max(k_width, v_width)] * 3, k_width**-0.5)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="k: 2 key/value heads do not divide 3"):
        softmax_attention(*problem((1, 3, 2, 4, 4, 2, 2)))
    with pytest.raises(ValueError, match="q: 5 causal queries .* 4 keys"):
        softmax_attention(*problem((1, 1, 1, 5, 4, 2, 2)))
    with pytest.raises(ValueError, match="backend must be one of .*flash_attn.*got 'triton'"):
        softmax_attention(*problem(SHAPES[1]), backend="triton")
    with pytest.raises(ValueError, match="'flash_attn' cannot run this call: it needs CUDA tensors.*cpu"):
        softmax_attention(*problem(SHAPES[1]), backend="flash_attn")


def test_auto_never_takes_the_kernel_for_cpu_tensors(monkeypatch):
    """Even with the package importable."""
    broken = types.ModuleType("flash_attn")
    broken.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    inputs = problem(SHAPES[1], torch.bfloat16)
    torch.testing.assert_close(softmax_attention(*inputs), softmax_attention(*inputs, backend="torch"))


class OnCuda(torch.Tensor):
    """What the refusal looks at, of a device that is not there."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtypes", "widths", "masked", "reason"),
    [
        ([torch.float32] * 3, (8, 8), False, "float16 or bfloat16"),
        ([torch.bfloat16, torch.bfloat16, torch.float32], (8, 8), False, "float16 or bfloat16"),
        ([torch.bfloat16] * 3, (8, 16), False, "equal key and value widths, these are 8 and 16"),
        ([torch.bfloat16] * 3, (8, 8), True, "no padding mask"),
        ([torch.bfloat16] * 3, (8, 8), False, "not installed"),
    ],
)
def test_the_kernel_refuses_with_its_reason(dtypes, widths, masked, reason, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sizes = zip(dtypes, (widths[0], *widths), strict=True)
    q, k, v = (torch.zeros(1, 2, 4, w, dtype=d).as_subclass(OnCuda) for d, w in sizes)
    mask = torch.ones(1, 4, dtype=torch.bool) if masked else None
    assert reason in attention._flash_refuses(q, k, v, mask, None)


def test_the_kernel_is_handed_time_before_heads(monkeypatch):
    """A stub in its place computes what it would, and sees the layout and the bounds that it wants."""
    seen = []

    def flash_attn_func(q, k, v, *, causal):
        seen.append((q.shape, k.shape, v.shape, causal))
        return softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, q_bounds, k_bounds, q_longest, k_longest, *, causal):
        assert q_bounds.dtype == torch.int32 and torch.equal(q_bounds, k_bounds)
        assert q_longest == k_longest == 6
        rows = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        return softmax_attention(*rows, causal=causal, cu_seqlens=q_bounds)[0].transpose(0, 1)

    stub = types.ModuleType("flash_attn")
    stub.flash_attn_func, stub.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    q, k, v = problem((1, 4, 2, 12, 12, 4, 4))
    torch.testing.assert_close(
        attention._flash(q, k, v, False, None, None), softmax_attention(q, k, v, causal=False)
    )
    assert seen == [((1, 12, 4, 4), (1, 12, 2, 4), (1, 12, 2, 4), False)]
    bounds = torch.tensor([0, 1, 7, 12])
    packed = attention._flash(q, k, v, True, None, bounds)
    torch.testing.assert_close(packed, softmax_attention(q, k, v, cu_seqlens=bounds))


@pytest.mark.parametrize("masked", [False, True])
def test_huge_future_keys_change_no_bit_of_the_past(masked):
    q, k, v = problem((1, 2, 2, 700, 700, 8, 8))
    mask = key_mask((1, 2, 2, 700, 700)) if masked else None
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 350:] *= 1e4
    v2[:, :, 350:] = 1e30
    before, after = softmax_attention(q, k, v, key_mask=mask), softmax_attention(q, k2, v2, key_mask=mask)
    assert torch.equal(before[:, :, :350], after[:, :, :350]) and not torch.equal(before, after)
