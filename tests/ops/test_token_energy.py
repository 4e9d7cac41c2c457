"""The token energy against its float64 reference, and the theorems that solvers rely on."""

from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from energy_cases import cast, energy_case, energy_cases
from helmholtz import kernels, ops, reference
from helmholtz.ops._logcosh import log_cosh_quotient
from helpers import assert_matches, grads

BUDGETS = {"energy": 45.0, "map": 90.0, "jvp": 75.0}
"""Worst measured: 14, 30 and 25 eps, in float64 (where the reference's rounding counts as well) and for gradients of
the two strengths, sums over all rows in which most cancels."""
SIZES = [(1, 1, 1, 1), (3, 7, 5, 9), (65, 16, 33, 130), (2, 3, 4, 1030)]
EMPTY = [(), (0,), "all"]
UNUSED = {"energy": {1}, "map": {1}, "jvp": {2}}
"""Inputs that do not enter: v, and u in the Jacobian."""


def _flat(call):
    """``call`` as a function of the tensors alone, for ``grads``."""

    def flat(z, v, u, a, gate, delta, weight, patterns, kappa, strength, log_prior=None):
        field = ops.TokenField(u, a, gate, delta)
        return call(z, v, field, ops.EnergyParameters(weight, patterns, log_prior, kappa, strength, 2.0))

    return flat


CALLS = {
    "energy": lambda m: _flat(lambda z, v, f, p: (m.token_energy(z, f, p),)),
    "map": lambda m: _flat(lambda z, v, f, p: (m.token_map(z, f, p),)),
    "jvp": lambda m: _flat(lambda z, v, f, p: (m.token_jvp(z, v, f, p),)),
}


@pytest.mark.parametrize("empty", EMPTY, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_matches_reference(name, dtype, size, empty):
    rows = range(size[3]) if empty == "all" else empty
    z, field, p = energy_case(*size, empty=rows, dtype=dtype)
    inputs = [z, torch.randn_like(z), *field, p.weight, p.patterns, p.kappa, p.strength]
    op, oracle = (partial(CALLS[name](module), log_prior=p.log_prior) for module in (ops, reference))
    (out,), (expected,) = op(*inputs), oracle(*inputs)
    assert out.dtype == dtype
    assert_matches(name, out, expected, budget=BUDGETS[name])
    used = [i for i in range(len(inputs)) if i not in UNUSED[name]]
    cotangent = [torch.randn(expected.shape, dtype=torch.float64)]

    def of(call):
        def of_used(*chosen):
            all_inputs = [*inputs]
            for i, x in zip(used, chosen, strict=True):
                all_inputs[i] = x
            (result,) = call(*all_inputs)
            return (result + 0 * sum(x.sum() for x in chosen),)  # an empty memory uses none of its patterns

        return of_used

    chosen = [inputs[i] for i in used]
    pairs = zip(used, grads(of(op), chosen, cotangent), grads(of(oracle), chosen, cotangent), strict=True)
    for i, got, wanted in pairs:
        assert_matches(f"gradient {i} of {name}", got, wanted, budget=BUDGETS[name])


@given(energy_cases())
def test_the_gradient_of_the_energy_is_the_residual(case):
    z, field, parameters = case
    z = z.requires_grad_()
    (slope,) = torch.autograd.grad(ops.token_energy(z, field, parameters).sum(), z)
    f = ops.token_map(z, field, parameters)
    assert f.isfinite().all()
    assert (slope - (z - f)).abs().amax() <= 1e-10 * (1 + f.abs().amax())


@given(energy_cases())
def test_every_step_lowers_the_energy_by_half_its_square(case):
    """The concave-convex inequality, whatever the strengths."""
    z, field, parameters = case
    for _ in range(5):
        f, energy = ops.token_map_and_energy(z, field, parameters)
        bound = energy - (f - z).square().sum(-1) / 2
        allowed = 1e-10 * (1 + energy.abs() + f.square().sum(-1) + z.square().sum(-1))
        assert (ops.token_energy(f, field, parameters) <= bound + allowed).all()
        z = f


@given(energy_cases())
def test_the_jacobian_is_that_of_autograd_symmetric_and_positive(case):
    z, field, parameters = case
    z, field = z[:1], ops.TokenField(*(x[:1] for x in field))
    d = z.shape[1]
    many = ops.TokenField(*(x.expand(d, -1) for x in field))
    columns = ops.token_jvp(z.expand(d, -1), torch.eye(d).double(), many, parameters)
    by_autograd = torch.autograd.functional.jacobian(
        lambda x: ops.token_map(x.unsqueeze(0), field, parameters).squeeze(0), z[0]
    )
    size = 1 + by_autograd.abs().amax()
    assert (columns.T - by_autograd).abs().amax() <= 1e-10 * size
    assert (columns - columns.T).abs().amax() <= 1e-10 * size
    assert torch.linalg.eigvalsh((columns + columns.T) / 2).amin() >= -1e-10 * size


@given(energy_cases())
def test_map_and_energy_are_the_two_bit_for_bit(case):
    for dtype in (torch.float64, torch.float32):
        z, field, parameters = (cast(x, dtype) if isinstance(x, tuple) else x.to(dtype) for x in case)
        f, energy = ops.token_map_and_energy(z, field, parameters)
        assert torch.equal(f, ops.token_map(z, field, parameters))
        assert torch.equal(energy, ops.token_energy(z, field, parameters))
        parts = ops.energy_components(z, field, parameters)
        with kernels.plain_forms():  # the kernel's log K is more exact; the reference holds it
            torch.testing.assert_close(sum(parts), ops.token_energy(z, field, parameters))
        assert torch.equal(parts.quadratic, z.square().sum(-1) / 2)


@given(energy_cases())
def test_the_certificate_is_the_reference(case):
    _, field, parameters = case
    certificate = ops.contraction_certificate(field, parameters)
    assert certificate == pytest.approx(
        reference.contraction_certificate(field, parameters), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(("n_patterns", "e"), [(2, 1), (3, 12), (40, 12)])
def test_the_certificate_bounds_the_jacobian_everywhere(n_patterns, e):
    """At 1,000 points, midpoints of patterns (where the spread is largest) among them; two patterns reach it."""
    _, field, parameters = energy_case(1000, 6, e, n_patterns, kappa=0.4, strength=0.3, beta=3.0)
    z = 2 * torch.randn(1000, 6, dtype=torch.float64)
    pairs = torch.randint(n_patterns, (400, 2))
    z[:400] = parameters.patterns[pairs].mean(1)
    certificate = ops.contraction_certificate(field, parameters)
    columns = [
        ops.token_jvp(z, axis.expand_as(z), field, parameters) for axis in torch.eye(6, dtype=torch.float64)
    ]
    norms = torch.linalg.matrix_norm(torch.stack(columns, dim=-1), 2)
    assert norms.amax() <= certificate * (1 + 1e-12)
    no_field = ops.contraction_certificate(
        field, parameters._replace(kappa=torch.zeros(1, dtype=torch.float64))
    )
    if n_patterns == 2:
        assert norms.amax() > 0.999 * no_field


def test_the_certificate_of_a_memory_with_one_row_or_none_is_the_field_s():
    _, field, parameters = energy_case(4, 6, 5, 3, empty=(0, 2))
    alone = ops.contraction_certificate(field, parameters)
    none = ops.contraction_certificate(field, parameters._replace(log_prior=torch.full((3,), -torch.inf)))
    assert 0 < alone == none


def test_empty_memory_is_no_memory():
    z, field, parameters = energy_case(empty=range(7))
    without = parameters._replace(strength=torch.zeros(1, dtype=torch.float64))
    none = parameters._replace(patterns=parameters.patterns[:0], log_prior=None)
    for other in (without, none):
        torch.testing.assert_close(ops.token_map(z, field, parameters), ops.token_map(z, field, other))
        torch.testing.assert_close(ops.token_energy(z, field, parameters), ops.token_energy(z, field, other))
        torch.testing.assert_close(ops.token_jvp(z, z, field, parameters), ops.token_jvp(z, z, field, other))


def test_what_an_empty_row_holds_does_not_matter():
    z, field, parameters = energy_case(empty=(2,))
    other = parameters._replace(patterns=parameters.patterns.clone())
    other.patterns[2] = 100.0
    for call in (ops.token_map, ops.token_energy):
        assert torch.equal(call(z, field, parameters), call(z, field, other))
    assert ops.contraction_certificate(field, parameters) == ops.contraction_certificate(field, other)


def test_computed_wide_also_under_autocast():
    z, field, parameters = energy_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f, energy = ops.token_map_and_energy(z, field, parameters)
    assert torch.equal(f, ops.token_map(z, field, parameters))
    assert torch.equal(energy, ops.token_energy(z, field, parameters))
    narrow = z.bfloat16()
    assert ops.token_map(narrow, field, parameters).dtype == torch.bfloat16
    assert ops.token_energy(narrow, field, parameters).dtype == torch.float32


def test_beta_is_checked():
    z, field, parameters = energy_case()
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        ops.token_energy(z, field, parameters._replace(beta=0.0))


# --- the quotient of log cosh


def _exact(a, delta, w):
    """The quotient and its derivatives by a, delta, w in 120 digits."""
    with mpmath.workdps(120):
        a, delta, w = (mpmath.mpf(x) for x in (a, delta, w))
        x, tanh = delta * w, mpmath.tanh(a)
        if delta == 0:
            return w * tanh, w * (1 - tanh**2), w**2 * (1 - tanh**2) / 2, tanh
        rise = mpmath.log(mpmath.cosh(a + x)) - mpmath.log(mpmath.cosh(a))
        slope = mpmath.tanh(a + x)
        return rise / delta, (slope - tanh) / delta, (x * slope - rise) / delta**2, slope


@given(
    a=st.floats(-60, 60), w=st.floats(-200, 200), delta=st.sampled_from([0.0, 1e-30, 1e-9, 1e-4, 1e-3, 0.04, 0.3, 1.0]),
    place=st.sampled_from(["anywhere", "root", "turning point"]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_quotient_and_its_derivatives_to_a_few_roundings(a, w, delta, place, dtype):
    """Also where the quotient is 0 (``delta w = -2 a``) and where the tanh is (``delta w = -a``)."""
    if place != "anywhere" and delta > 1e-4:
        w = (-2 if place == "root" else -1) * a / delta
    inputs = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (a, delta, w)]
    q = log_cosh_quotient(*inputs)
    got = (q, *torch.autograd.grad(q.sum(), inputs))
    a, delta, w = (x.item() for x in inputs)
    eps, size = torch.finfo(dtype).eps, abs(w)
    by_w = 1 + (abs(a) + abs(delta * w)) * float(1 - mpmath.tanh(a + delta * w) ** 2)
    scales = (size, size, size**2, by_w)
    for actual, exact, scale in zip(got, _exact(a, delta, w), scales, strict=True):
        assert abs(float(mpmath.mpf(actual.item()) - exact)) <= 4 * eps * scale + 1e-40


@given(
    a=st.floats(-60, 60), w=st.floats(-200, 200), delta=st.sampled_from([0.0, 1e-30, 1e-9, 1e-4, 1e-3, 0.04, 0.3, 1.0]),
    place=st.sampled_from(["anywhere", "root", "turning point"]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_an_energy_holds_the_quotient_to_a_few_roundings(a, w, delta, place, dtype):
    """Of one channel at ``z = 1``, all else being 0; its map is the tanh."""
    if place != "anywhere" and delta > 1e-4:
        w = (-2 if place == "root" else -1) * a / delta
    a, delta, w = (torch.tensor([[x]], dtype=dtype) for x in (a, delta, w))
    one, eps = torch.ones(1, 1, dtype=dtype), torch.finfo(dtype).eps
    parameters = ops.EnergyParameters(w, one[:0], None, one[0], one[0], 1.0)
    f, energy = ops.token_map_and_energy(one, ops.TokenField(one / 2, a, one, delta), parameters)
    a, delta, w = (x.item() for x in (a, delta, w))
    quotient, *_, slope = _exact(a, delta, w)
    assert abs(float(quotient + mpmath.mpf(energy.item()))) <= 4 * eps * abs(w) + 1e-40
    by_a = 1 + (abs(a) + abs(delta * w)) * float(1 - mpmath.tanh(a + delta * w) ** 2)
    assert abs(float(mpmath.mpf(f.item()) - 0.5 - w * slope)) <= 4 * eps * (1 + abs(w) * by_a)


@pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
def test_the_kernel_is_left_alone_where_gradients_are_asked_for():
    z, field, parameters = energy_case()
    with torch.no_grad():
        f, energy = ops.token_map_and_energy(z.requires_grad_(), field, parameters)
    assert not energy.requires_grad and ops.token_energy(z, field, parameters).requires_grad
    torch.testing.assert_close(ops.token_map(z, field, parameters), f)


def test_one_jacobian_is_for_any_number_of_products_and_rows():
    z, field, parameters = energy_case()
    jacobian, v = ops.token_jacobian(z, field, parameters), torch.randn(2, *z.shape, dtype=z.dtype)
    for x in v:
        assert torch.equal(jacobian.product(x), ops.token_jvp(z, x, field, parameters))
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(jacobian.take(rows).product(v[0][rows]), jacobian.product(v[0])[rows])


def test_the_naive_quotient_loses_every_digit_where_this_one_keeps_them():
    a, w, delta = torch.tensor([0.7]), torch.tensor([1.3]), torch.tensor([1e-7])
    exact = float(_exact(a.item(), delta.item(), w.item())[0])
    naive = ((a + delta * w).cosh().log() - a.cosh().log()) / delta
    assert abs(naive.item() - exact) > 0.1
    assert abs(log_cosh_quotient(a, delta, w).item() - exact) < 2e-7


def test_quotient_far_out_is_finite():
    a = torch.tensor([80.0, -80.0, 0.0, 300.0])
    w = torch.tensor([1e4, 1e4, -1e6, -600.0])
    inputs = [x.requires_grad_() for x in (a, torch.ones(4), w)]
    q = log_cosh_quotient(*inputs)
    torch.testing.assert_close(q, torch.tensor([1e4, 1e4 - 160, 1e6 - 0.6931, 0.0]), atol=1e-3, rtol=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(q.sum(), inputs))


def test_quotient_differentiates_twice():
    inputs = [torch.randn(6).double(), 0.2 + torch.rand(6).double(), 3 * torch.randn(6).double()]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(log_cosh_quotient, inputs)
    assert torch.autograd.gradgradcheck(log_cosh_quotient, inputs)
