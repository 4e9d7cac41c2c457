"""Usage of a latent code: against enumeration, the cases known in closed form, memory, and bad input."""

import math
import re
import sys
from dataclasses import astuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helmholtz import ops, reference
from helpers import DTYPES


def problem(n_bits, batch=(3, 7), dtype=torch.float64):
    logits = (2 * torch.randn(*batch, n_bits, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(2**n_bits, batch)


def assert_equal(actual, expected, *, rel=1e-10):
    for name, a, e in zip(actual.__slots__, astuple(actual), expected, strict=True):
        assert a == pytest.approx(e, rel=rel, abs=1e-12), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_bits", [1, 2, 3, 7, 10])
def test_usage_equals_enumeration(n_bits, dtype):
    logits, code = problem(n_bits, dtype=dtype)
    mask = torch.rand(3, 7) < 0.6
    assert_equal(ops.code_usage(logits, code), reference.code_usage(logits, code))
    assert_equal(ops.code_usage(logits, code, mask), reference.code_usage(logits, code, mask))
    assert_equal(ops.code_usage(logits, code, mask), astuple(ops.code_usage(logits[mask], code[mask])))


@pytest.mark.parametrize("n_bits", [1, 2, 5, 9])
def test_probabilities_equal_enumeration(n_bits):
    logits, _ = problem(n_bits)
    expected = reference.code_probabilities(logits)
    torch.testing.assert_close(ops.code_probabilities(logits), expected, rtol=1e-12, atol=0.0)


def test_chunks_change_nothing(monkeypatch):
    logits, code = problem(5)
    whole = astuple(ops.code_usage(logits, code))
    for tokens in (1, 4, 20):
        monkeypatch.setattr(sys.modules["helmholtz.ops.code_usage"], "CHUNK_TOKENS", tokens)
        assert_equal(ops.code_usage(logits, code), whole, rel=1e-12)


def test_a_code_that_says_nothing():
    usage = ops.code_usage(torch.zeros(64, 4), torch.arange(64) % 16)
    assert (usage.kl, usage.active_bits, usage.codes_used) == (0.0, 0, 16)
    assert usage.perplexity == pytest.approx(16.0)
    assert usage.mutual_information == pytest.approx(0.0, abs=1e-12)


def test_the_same_code_for_every_token_costs_much_and_says_nothing():
    logits = torch.tensor([20.0, -20.0, 20.0, 0.0]).expand(50, 4)
    usage = ops.code_usage(logits, torch.full((50,), 5))
    assert usage.kl == pytest.approx(3 * math.log(2), rel=1e-6)
    assert usage.kl_per_bit[3] == 0.0
    assert (usage.active_bits, usage.codes_used, usage.perplexity) == (3, 1, 1.0)
    assert usage.mutual_information == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("n_bits", "n_tokens"), [(3, 8), (6, 20), (16, 100)])
def test_a_code_of_its_own_for_each_token_says_all_there_is_to_say(n_bits, n_tokens):
    code = torch.arange(n_tokens)
    logits = torch.where(ops.code_to_bits(code, n_bits), 60.0, -60.0)
    usage = ops.code_usage(logits, code)
    assert usage.mutual_information == pytest.approx(math.log(n_tokens))
    assert usage.perplexity == pytest.approx(n_tokens)
    assert usage.kl == pytest.approx(n_bits * math.log(2))


class LargestResult(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_sixteen_bits_of_many_tokens_never_have_tokens_times_codes_elements():
    logits, code = problem(16, batch=(2, 4096))
    with LargestResult() as largest:
        usage = ops.code_usage(logits, code)
    assert largest.elements == 8192 * 256
    assert 0 < usage.mutual_information <= math.log(8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"code": torch.zeros(3, 6, dtype=torch.long)},
            "code must be of shape (3, 7) as the logits, got (3, 6)",
        ),
        ({"code": torch.full((3, 7), 16)}, "code must be in [0, 16), got 'values from 16 to 16'"),
        ({"code": torch.full((3, 7), -1)}, "code must be in [0, 16), got 'values from -1 to -1'"),
        ({"code": torch.zeros(3, 7)}, "code must be of an integer dtype, got torch.float32"),
        ({"code": torch.zeros(3, 7, dtype=torch.bool)}, "code must be of an integer dtype, got torch.bool"),
        ({"mask": torch.ones(3, 7)}, "mask must be of dtype torch.bool, got torch.float32"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask must be of shape (3, 7) as the code, got (7,)"),
        ({"mask": torch.zeros(3, 7, dtype=torch.bool)}, "code must be of at least one token"),
        ({"logits": torch.zeros(3, 7, 17)}, "logits.shape[-1] must be in 1..16, got 17"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change, message):
    logits, code = problem(4)
    arguments = {"logits": logits, "code": code, "mask": None} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.code_usage(**arguments)
