"""Binary latents against enumeration of every code, and the extremes: certain bits, 16 of them, narrow dtypes."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helmholtz import kernels, ops, reference
from helmholtz.ops import binary_latent
from helpers import DTYPES, assert_matches, grads

BUDGET = 10.0  # worst measured: 2.1 eps (relative RMS over outputs and gradients)
N_BITS = range(1, 17)


def problem(n_bits, batch=(2, 5), width=3, dtype=torch.float64, spread=2.0):
    table = torch.randn(2**n_bits, width, dtype=dtype)
    logits = (spread * torch.randn(*batch, n_bits, dtype=torch.float64)).to(dtype)
    return table, torch.randint(2**n_bits, batch), logits


def lookup_grads(module, table, code, logits, cotangent):
    return grads(lambda w, x: (module.code_lookup(w, code, x),), (table, logits), (cotangent,))


# --- bits and codes


@pytest.mark.parametrize("n_bits", N_BITS)
def test_bits_and_codes_are_inverse(n_bits):
    code = torch.arange(2**n_bits)
    bits = ops.code_to_bits(code, n_bits)
    assert bits.dtype == torch.bool and torch.equal(bits, reference.code_to_bits(code, n_bits))
    for kind in (torch.bool, torch.uint8, torch.int16, torch.int64):
        assert torch.equal(ops.bits_to_code(bits.to(kind)), code)
    assert torch.equal(reference.bits_to_code(bits), code)
    assert ops.bits_to_code(torch.ones(3, n_bits, dtype=torch.bool)).tolist() == [2**n_bits - 1] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_drawn_independently_with_their_probabilities(dtype):
    n = 20_000
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=dtype).expand(n, 5)
    bits = ops.sample_bits(logits, generator=torch.Generator().manual_seed(3)).double()
    p = logits[0].double().sigmoid()
    assert ((bits.mean(0) - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    correlation = bits.T.corrcoef() - torch.eye(5)
    assert correlation.abs().max() < 4 / math.sqrt(n)


def test_certain_bits_and_the_generator():
    logits = torch.tensor([torch.inf, -torch.inf, 1e4, -1e4]).expand(1000, 4)
    bits = ops.sample_bits(logits, generator=torch.Generator())
    assert torch.equal(bits, torch.tensor([True, False, True, False]).expand(1000, 4))
    even = torch.zeros(7, 16)
    first, second = (ops.sample_bits(even, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    before = torch.random.get_rng_state()
    assert torch.equal(first, second)
    assert not torch.equal(first, ops.sample_bits(even, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(before, torch.random.get_rng_state())


# --- the lookup


@pytest.mark.parametrize("n_bits", range(1, 11))
def test_lookup_and_its_gradients_equal_enumeration(n_bits):
    table, code, logits = problem(n_bits)
    assert torch.equal(ops.code_lookup(table, code, logits), table[code])
    assert torch.equal(ops.code_lookup(table, code), table[code])
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    actual = lookup_grads(ops, table, code, logits, cotangent)
    expected = lookup_grads(reference, table, code, logits, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)


def test_gradient_is_the_difference_of_conditional_expectations():
    """``p (1 - p) (E[g | on] - E[g | off])``, whatever code was drawn."""
    table, code, logits = problem(6)
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    g, probability = cotangent @ table.T, reference.code_probabilities(logits)
    torch.testing.assert_close(probability.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    p, bits = logits.sigmoid(), reference.code_to_bits(torch.arange(64), 6).double()
    on, off = (probability * g) @ bits / p, (probability * g) @ (1 - bits) / (1 - p)
    for drawn in (code, 63 - code):
        actual = lookup_grads(ops, table, drawn, logits, cotangent)[1]
        torch.testing.assert_close(actual, p * (1 - p) * (on - off), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("n_bits", [11, 16])
def test_a_table_linear_in_the_bits_has_a_gradient_known_in_closed_form(n_bits):
    """Beyond what is cheap to enumerate: of ``W_d = sum_h U_h(d) w_h`` it is ``p (1 - p) <grad, w_h>``."""
    slopes = torch.randn(n_bits, 3, dtype=torch.float64)
    table = ops.code_to_bits(torch.arange(2**n_bits), n_bits).double() @ slopes
    _, code, logits = problem(n_bits)
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    p = logits.sigmoid()
    actual = lookup_grads(ops, table, code, logits, cotangent)[1]
    torch.testing.assert_close(actual, p * (1 - p) * (cotangent @ slopes.T), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_bits", [1, 8, 12])
def test_lookup_in_every_dtype(n_bits, dtype):
    table, code, logits = problem(n_bits, dtype=dtype)
    out = ops.code_lookup(table, code, logits)
    assert out.dtype == dtype and torch.equal(out, table[code])
    cotangent = torch.randn(2, 5, 3).to(dtype).double()
    actual = lookup_grads(ops, table, code, logits, cotangent)
    expected = lookup_grads(reference, table, code, logits, cotangent)
    for name, a, e in zip(("table", "logits"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert_matches(name, a, e, budget=BUDGET)


def test_gradient_keeps_its_digits_where_bits_are_all_but_certain():
    table, code, _ = problem(4, batch=(4,), dtype=torch.float32)
    logits = torch.tensor([20.0, -20.0, 30.0, -30.0]).expand(4, 4) * torch.tensor(
        [[1.0], [-1.0], [0.5], [1.2]]
    )
    cotangent = torch.randn(4, 3).double()
    actual = lookup_grads(ops, table, code, logits, cotangent)[1]
    expected = lookup_grads(reference, table, code, logits, cotangent)[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)
    endless = torch.tensor([torch.inf, -torch.inf, torch.inf, 0.0]).expand(4, 4)
    at_infinity = lookup_grads(ops, table, code, endless, cotangent)[1]
    assert not at_infinity[:, :3].any() and at_infinity[:, 3].all()


def test_tiles_of_codes_change_nothing(monkeypatch):
    table, code, logits = problem(5, batch=(3, 7))
    cotangent = torch.randn(3, 7, 3, dtype=torch.float64)
    whole = lookup_grads(ops, table, code, logits, cotangent)
    for bits in (0, 1, 3, 5):
        monkeypatch.setattr(binary_latent, "TILE_BITS", bits)
        for a, e in zip(lookup_grads(ops, table, code, logits, cotangent), whole, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_bits", [2, 10])
def test_more_tokens_than_a_tile_holds(n_bits):
    table, code, logits = problem(n_bits, batch=(1030,))
    cotangent = torch.randn(1030, 3, dtype=torch.float64)
    actual = lookup_grads(ops, table, code, logits, cotangent)
    expected = lookup_grads(reference, table, code, logits, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_the_lookup_are_those_of_its_equation_or_refused(form):
    """As the equation stands: what finite differences of the first derivative see is the code that was drawn."""
    table, code, logits = problem(3, batch=(2,), width=2)
    leaves = table.requires_grad_(), logits.requires_grad_()

    def gradients(module):
        out = module.code_lookup(table, code, logits)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    if form == "kernel":
        with pytest.raises(
            RuntimeError, match="derivative for helmholtz::code_lookup_backward is not implemented"
        ):
            gradients(ops)
        return
    for a, e in zip(gradients(ops), gradients(reference), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_autocast_narrows_nothing(form):
    table, code, logits = problem(10, dtype=torch.float32)
    cotangent = torch.randn(2, 5, 3).double()
    plain = lookup_grads(ops, table, code, logits, cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.code_lookup(table, code, logits), table[code])
        if form == "kernel":
            cast = lookup_grads(ops, table, code, logits, cotangent)  # backward under autocast as well
        leaves = table.clone().requires_grad_(), logits.clone().requires_grad_()
        out = ops.code_lookup(leaves[0], code, leaves[1])
        assert torch.equal(ops.kl_per_bit(logits), binary_latent.kl_per_bit(logits.float()))
        assert ops.kl_per_token(logits.bfloat16()).dtype == torch.float32
    if form == "plain":
        cast = torch.autograd.grad(out, leaves, cotangent.float())
    for a, e in zip(cast, plain, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)


def test_only_what_needs_a_gradient_gets_one():
    table, code, logits = problem(3)
    (only_logits,) = torch.autograd.grad(
        ops.code_lookup(table, code, logits.requires_grad_()).square().sum(), logits
    )
    assert only_logits.all()
    table.requires_grad_()
    for given in (None, logits.detach()):
        (rows,) = torch.autograd.grad(ops.code_lookup(table, code, given).sum(), table)
        assert torch.equal(rows[:, 0], torch.bincount(code.flatten(), minlength=8).double())


def test_strided_and_empty_inputs():
    table, code, logits = problem(4, batch=(5, 2))
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    strided = [table.T.contiguous().T, code.T, logits.transpose(0, 1)]
    actual = lookup_grads(ops, *strided, cotangent)
    expected = lookup_grads(reference, *strided, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)
    nothing = lookup_grads(ops, table, code[:0], logits[:0], cotangent.transpose(0, 1)[:0])
    assert not nothing[0].any() and nothing[1].shape == (0, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_bits", [1, 5, 10])
def test_log_probability_of_a_code_matches_the_distribution_over_all(n_bits, dtype):
    logits = (3 * torch.randn(4, 7, n_bits)).to(dtype)
    code = torch.randint(2**n_bits, (4, 7))
    wide = torch.promote_types(dtype, torch.float32)
    expected = reference.code_log_probability(code, logits)
    torch.testing.assert_close(
        ops.code_log_probability(code, logits), expected.to(wide), rtol=30 * torch.finfo(wide).eps, atol=0.0
    )
    certain = torch.full((1, n_bits), 1e4)
    assert ops.code_log_probability(torch.tensor([2**n_bits - 1]), certain) == 0
    assert ops.code_log_probability(torch.tensor([0]), certain) == -1e4 * n_bits
    with pytest.raises(ValueError, match="code must be in"):
        ops.code_log_probability(torch.tensor([2**n_bits]), certain)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_has_tokens_times_codes_elements(form):
    table, code, logits = problem(12, batch=(4, 40), dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = ops.code_lookup(table.requires_grad_(), code, logits.requires_grad_())
    kept = sum(x.numel() for x in {x.data_ptr(): x for x in saved}.values())
    inputs = table.numel() + code.numel() + logits.numel()
    assert kept == inputs or form == "plain" and kept <= inputs + 160 * (3 << binary_latent.TILE_BITS)
    with LargestResult() as largest:
        out.sum().backward()
    assert largest.elements <= 160 << binary_latent.TILE_BITS < 160 * 2**12


MEMORY = """
import re, torch
from pathlib import Path
from helmholtz.ops import code_lookup
torch.set_num_threads(1)
def peak():  # in kB, of this program alone, unlike ru_maxrss
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
table, logits = torch.randn(1 << 16, 128, requires_grad=True), torch.zeros(8, 1024, 16, requires_grad=True)
code = torch.randint(1 << 16, (8, 1024))
few = torch.zeros(2, 3, requires_grad=True), torch.zeros(5, dtype=torch.long), torch.zeros(5, 1, requires_grad=True)
code_lookup(*few).square().sum().backward()
before = peak()
code_lookup(table, code, logits).square().sum().backward()
assert logits.grad.isfinite().all() and logits.grad.any() and table.grad.any()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sixteen_bits_at_8_x_1024_tokens_stay_under_500_mb(form):
    env = os.environ | {kernels.SWITCH: "auto" if form == "kernel" else "plain"}
    env["MALLOC_MMAP_THRESHOLD_"] = (
        "1000000"  # else small tensors take the places of large ones, which move on
    )
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=env)
    assert 40 < int(done.stdout) / 1000 < 500  # 34 MB of them the gradient of the table


# --- KL and free bits


@pytest.mark.parametrize("n_bits", range(1, 11))
def test_kl_and_its_gradient_equal_enumeration(n_bits):
    logits = 3 * torch.randn(4, 6, n_bits, dtype=torch.float64)
    for name, shape in (("kl_per_bit", logits.shape), ("kl_per_token", logits.shape[:-1])):
        cotangent = torch.randn(shape, dtype=torch.float64)
        op, oracle = getattr(ops, name), getattr(reference, name)
        torch.testing.assert_close(op(logits), oracle(logits), rtol=1e-10, atol=1e-13)
        (actual,) = grads(lambda x, op=op: (op(x),), (logits,), (cotangent,))
        (expected,) = grads(lambda x, op=oracle: (op(x),), (logits,), (cotangent,))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    (slope,) = grads(lambda x: (ops.kl_per_bit(x),), (logits,), (torch.ones_like(logits),))
    torch.testing.assert_close(slope, logits * logits.sigmoid() * (1 - logits.sigmoid()), rtol=1e-9, atol=0.0)
    assert torch.autograd.gradgradcheck(ops.kl_per_bit, logits[:1, :2].requires_grad_())


def test_kl_is_zero_only_at_zero_and_keeps_its_digits_near_it():
    assert not ops.kl_per_bit(torch.zeros(5, 4)).any()
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        logits = torch.logspace(-15, -4, 60, dtype=dtype)
        series = logits.double().square() / 8 - logits.double() ** 4 / 64
        for signed in (logits, -logits):
            torch.testing.assert_close(ops.kl_per_bit(signed).double(), series, rtol=rtol, atol=0.0)


def test_kl_in_float32_is_exact_to_rounding_over_all_sizes():
    logits = torch.logspace(-1.5, 4, 2000)
    logits = torch.cat([-logits, logits])
    expected = reference.kl_per_bit(logits)
    torch.testing.assert_close(ops.kl_per_bit(logits).double(), expected, rtol=1e-6, atol=0.0)


def test_kl_is_even_grows_with_the_size_of_the_logit_and_is_convex_in_the_probability():
    logits = torch.linspace(0, 12, 400, dtype=torch.float64)
    kl = ops.kl_per_bit(logits)
    assert torch.equal(kl, ops.kl_per_bit(-logits))
    assert (kl.diff() > 0).all()
    p = torch.linspace(0.01, 0.99, 199, dtype=torch.float64)
    assert (ops.kl_per_bit(p.logit()).diff().diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, torch.inf])
def test_kl_of_certain_bits_is_h_ln_2_with_gradient_zero(dtype, size):
    logits = torch.tensor([size, -size] * 8, dtype=dtype, requires_grad=True)
    kl = ops.kl_per_token(logits)
    torch.testing.assert_close(kl.double(), torch.tensor(16 * math.log(2)).double(), rtol=1e-6, atol=0.0)
    (slope,) = torch.autograd.grad(kl, logits)
    assert slope.dtype == dtype and not slope.any()


def test_free_bits_is_the_reference():
    kl = torch.rand(3, 11, dtype=torch.float64) * 4
    mask = torch.rand(3, 11) < 0.6
    for kappa in (0.0, 0.5, 2.0, 4.0):
        for chosen in (None, mask):

            def op(x, module=ops, kappa=kappa, chosen=chosen):
                return (module.free_bits(x, kappa, mask=chosen),)

            def oracle(x, op=op):
                return op(x, reference)

            torch.testing.assert_close(op(kl)[0], oracle(kl)[0], rtol=1e-12, atol=0.0)
            one = torch.ones((), dtype=torch.float64)
            assert_matches("kl", grads(op, (kl,), (one,))[0], grads(oracle, (kl,), (one,))[0], budget=BUDGET)


def test_the_hinge_comes_before_the_mean():
    kappa = ops.bits_to_nats(0.25)
    assert kappa == pytest.approx(0.25 * math.log(2))
    kl = torch.tensor([0.0, 2 * kappa], requires_grad=True)
    penalty = ops.free_bits(kl, kappa)
    assert penalty.item() == pytest.approx(kappa / 2)
    penalty.backward()
    assert kl.grad.tolist() == [0.0, 0.5]


def test_free_bits_at_both_ends():
    logits = (5 * torch.randn(4, 9, 16, dtype=torch.float64)).requires_grad_()
    kl = ops.kl_per_token(logits)
    torch.testing.assert_close(ops.free_bits(kl, 0.0), kl.mean())
    penalty = ops.free_bits(kl, ops.bits_to_nats(16))
    assert penalty.item() == 0
    assert not torch.autograd.grad(penalty, logits)[0].any()
    at_kappa = torch.full((3,), 0.5, requires_grad=True)
    assert not torch.autograd.grad(ops.free_bits(at_kappa, 0.5), at_kappa)[0].any()


def test_pads_count_nothing():
    kl = torch.tensor([[1.0, 2.0, 50.0], [4.0, torch.nan, torch.inf]], requires_grad=True)
    real = torch.tensor([[True, True, False], [True, False, False]])
    penalty = ops.free_bits(kl, 1.5, mask=real)
    assert penalty.item() == pytest.approx((0.0 + 0.5 + 2.5) / 3)
    penalty.backward()
    torch.testing.assert_close(kl.grad, torch.tensor([[0.0, 1 / 3, 0], [1 / 3, 0, 0]]))
    for nothing in (
        ops.free_bits(kl, 1.5, mask=torch.zeros_like(real)),
        ops.free_bits(torch.zeros(2, 0), 1.5),
    ):
        assert nothing.item() == 0


# --- errors

TABLE, CODE, LOGITS = torch.zeros(8, 2), torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bits_to_code(torch.ones(3, 17, dtype=torch.bool)), "at most 16, got 17"),
        (lambda: ops.bits_to_code(torch.ones(3, 0, dtype=torch.bool)), "at least 1, got 0"),
        (lambda: ops.bits_to_code(torch.ones(3, 4)), "bits must be of an integer dtype, got torch.float32"),
        (
            lambda: ops.bits_to_code(torch.tensor([0, 2])),
            r"bits must be in \[0, 2\), got 'values from 0 to 2'",
        ),
        (lambda: ops.code_to_bits(CODE, 0), "n_bits must be an integer of at least 1"),
        (lambda: ops.code_to_bits(CODE, 17), "n_bits must be at most 16"),
        (lambda: ops.code_to_bits(CODE + 8, 3), r"code must be in \[0, 8\), got 'values from 8 to 8'"),
        (lambda: ops.code_to_bits(CODE.float(), 3), "code must be of an integer dtype, got torch.float32"),
        (lambda: ops.code_to_bits(CODE.bool(), 3), "code must be of an integer dtype, got torch.bool"),
        (lambda: ops.code_lookup(TABLE, CODE - 1, LOGITS), r"code must be in \[0, 8\)"),
        (lambda: ops.code_lookup(TABLE, CODE + 8), r"code must be in \[0, 8\)"),
        (lambda: ops.code_lookup(TABLE, CODE.bfloat16(), LOGITS), "code must be of an integer dtype"),
        (lambda: ops.code_lookup(TABLE[:7], CODE, LOGITS), r"table must be 2\*\*H rows with H in 1..16"),
        (lambda: ops.code_lookup(TABLE[:1], CODE), r"table must be 2\*\*H rows"),
        (lambda: ops.code_lookup(torch.zeros(1 << 17, 1), CODE), r"table must be 2\*\*H rows"),
        (
            lambda: ops.code_lookup(TABLE, CODE, LOGITS[..., :2]),
            r"logits must be \(2, 5, 3\), got \(2, 5, 2\)",
        ),
        (lambda: ops.code_lookup(TABLE, CODE, LOGITS[:1]), r"logits must be \(2, 5, 3\)"),
        (
            lambda: ops.free_bits(torch.zeros(3), -0.1),
            "kappa must be a finite number of at least 0, got -0.1",
        ),
        (lambda: ops.free_bits(torch.zeros(3), math.nan), "kappa must be a finite number"),
        (
            lambda: ops.free_bits(torch.zeros(2, 3), 1.0, mask=torch.ones(3).bool()),
            "mask must be of the shape",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
