"""The free energy under any mask against its float64 reference and against the causal read."""

import pytest
import torch

from helmholtz.ops import free_energy_read, masked_free_energy
from helmholtz.reference import free_energy as reference
from helpers import DTYPES, assert_matches, grads

NAMES = ["q", "k", "v", "beta"]
MASKS = {
    "none": None,
    "rows": torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.3,
    "bool": torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) > 0.5,
    "added": torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(3)),
    "added, some hidden": torch.randn(5, 7).masked_fill(torch.eye(5, 7) > 0, -torch.inf),
}


def problem(dtype=torch.float32, *, heads=4, groups=2, times=5, sources=7, width=3):
    q, k = torch.randn(2, heads, times, 6), torch.randn(2, groups, sources, 6)
    v, beta = torch.randn(2, groups, sources, width), torch.rand(groups, width) + 0.5
    return tuple(x.to(dtype) for x in (q, k, v, beta))


def assert_op_matches(inputs, *, budget=16, **call):
    actual = masked_free_energy(*inputs, **call)
    assert_matches("free", actual, reference.masked_free_energy(*inputs, **call), budget=budget)
    cotangent = [torch.randn_like(actual).double()]
    both = [
        grads(lambda *given, fn=fn: [fn(*given, **call)], inputs, cotangent)
        for fn in (masked_free_energy, reference.masked_free_energy)
    ]
    for name, got, want in zip(NAMES, *both, strict=True):
        assert_matches(name, got, want, budget=4 * budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_matches_the_reference_under_every_kind_of_mask(dtype, mask):
    assert_op_matches(problem(dtype), mask=MASKS[mask])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("width", [2, 6, 9])
def test_heads_may_share_and_values_may_be_narrower_or_wider_than_keys(groups, width):
    assert_op_matches(problem(groups=groups, times=6, sources=6, width=width), causal=True)


@pytest.mark.parametrize("options", [{"scale": 1.3}, {"cap": 0.7}, {"scale": 0.2, "cap": 2.0}])
def test_scale_and_cap_match_the_reference(options):
    assert_op_matches(problem(torch.float64), budget=64, **options)


def test_a_causal_prior_is_the_one_of_the_read():
    q, k, v, beta = problem(torch.float64, times=7)
    expected = free_energy_read(q, k, v, beta)[1]
    torch.testing.assert_close(masked_free_energy(q, k, v, beta, causal=True), expected)


@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_sees_nothing_reads_zero_with_gradient_zero(added):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if added:
        mask = torch.zeros(5, 7).masked_fill(~mask, -torch.inf)
    inputs = [x.requires_grad_() for x in problem()]
    free = masked_free_energy(*inputs, mask=mask)
    assert (free[:, :, 2] == 0).all() and (free[:, :, 1] != 0).all()
    for grad in torch.autograd.grad(free[:, :, 2].sum(), inputs):
        assert (grad == 0).all()


def test_it_is_float32_at_least_also_under_autocast():
    inputs = problem(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        free = masked_free_energy(*inputs)
    assert free.dtype == torch.float32
    assert torch.equal(free, masked_free_energy(*inputs))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"causal": True}, "causal: wanted as many queries as keys and no mask, got 5 queries of 7 keys"),
        ({"causal": True, "mask": MASKS["bool"]}, "got a mask"),
    ],
)
def test_causal_calls_that_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        masked_free_energy(*problem(), **call)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="k: 2 key/value heads do not divide 3 query heads"):
        masked_free_energy(*problem(heads=3))


def test_a_learned_mask_gets_its_gradient():
    q, k, v, beta = problem(torch.float64)
    added = MASKS["added, some hidden"].double()
    cotangent = torch.randn_like(masked_free_energy(q, k, v, beta, mask=added))
    both = []
    for fn in (masked_free_energy, reference.masked_free_energy):
        mask = added.clone().requires_grad_()
        both.append(torch.autograd.grad((fn(q, k, v, beta, mask=mask) * cotangent).sum(), mask)[0])
    torch.testing.assert_close(*both)
    assert both[0].norm() > 0.1
