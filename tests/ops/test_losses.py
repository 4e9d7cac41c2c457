"""The language-model loss against its formula, with targets that do not count."""

import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helmholtz.ops.losses import cross_entropy, head_cross_entropy
from helpers import DTYPES, assert_matches, grads


def formula(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Float64, one token at a time."""
    losses = [
        row.exp().sum().log() - row[target]
        for row, target in zip(logits.double().flatten(0, 1), targets.flatten().tolist(), strict=True)
        if target != ignore_index
    ]
    return torch.stack(losses).mean() if losses else 0 * logits.double().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 37)], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_value_and_gradient_match_the_formula(shape, dtype, ignored) -> None:
    logits, targets = (3 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])
    if ignored and targets.numel() > 1:
        targets[0, 1:3] = -7
    loss = cross_entropy(logits, targets, ignore_index=-7)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_matches("loss", loss, formula(logits, targets, -7), budget=8)
    one = [torch.ones((), dtype=torch.float64)]
    (got,) = grads(lambda x: [cross_entropy(x, targets, ignore_index=-7)], [logits], one)
    (want,) = grads(lambda x: [formula(x, targets, -7)], [logits], one)
    assert_matches("dlogits", got, want, budget=8)


def test_scaled_losses_have_scaled_gradients() -> None:
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets) * -0.7, logits)


def test_where_nothing_counts_the_loss_and_its_gradient_are_zero() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[0, 0]]))
    assert loss.item() == pytest.approx(1e4)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert cross_entropy(torch.zeros(1, 1, 8), torch.tensor([[3]])).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 257, 3001])
def test_large_logits_of_any_vocabulary_match_the_formula(dtype, vocabulary) -> None:
    """Rows of a slice; logits of up to 100 and one that is infinitely unlikely."""
    logits = (30 * torch.randn(2, 6, vocabulary)).to(dtype)
    logits[0, 2, 0] = -torch.inf
    logits, targets = logits[:, 1:], torch.randint(1, vocabulary, (2, 5))
    targets[1, 3] = -100
    one = [torch.ones((), dtype=torch.float64)]
    assert_matches("loss", cross_entropy(logits, targets), formula(logits, targets), budget=8)
    (got,) = grads(lambda x: [cross_entropy(x, targets)], [logits], one)
    (want,) = grads(lambda x: [formula(x, targets)], [logits], one)
    assert got.dtype == dtype
    assert_matches("dlogits", got, want, budget=60)  # of exp at differences of up to 200


@pytest.mark.parametrize("target", [5, -1, -100])
def test_a_target_outside_the_vocabulary_is_an_error(target) -> None:
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(1, 1, 5), torch.tensor([[target]]), ignore_index=-7)


def in_pieces(head, x, targets, most):
    return head_cross_entropy(head, x, targets, most_tokens=most, ignore_index=-7)


@pytest.mark.parametrize("most", [1, 4, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_loss_in_pieces_is_the_whole_loss(dtype, most) -> None:
    """13 tokens, so that no piece but the whole divides them; the head has a bias and hooks."""
    head, x = nn.Linear(6, 37, dtype=dtype), torch.randn(1, 13, 6, dtype=dtype, requires_grad=True)
    targets, calls = torch.randint(37, (1, 13)), []
    targets[0, [2, 3, 12]] = -7
    head.register_forward_hook(lambda module, args, output: calls.append(len(args[0][0])))
    leaves = [x, head.weight, head.bias]
    whole = cross_entropy(head(x), targets, ignore_index=-7)
    calls.clear()
    loss = in_pieces(head, x, targets, most)
    assert sum(calls) == 13 and max(calls) == min(most, 13)
    assert_matches("loss", loss, whole.double(), budget=4)
    weight = torch.tensor(-0.7, dtype=loss.dtype)
    both = [torch.autograd.grad(value, leaves, weight) for value in (loss, whole)]
    assert sum(calls) == 26 or most == 100
    for got, want in zip(*both, strict=True):
        assert_matches("gradient", got, want.double(), budget=16)


def test_pieces_under_autocast_add_their_gradients_up_in_the_weights_dtype() -> None:
    """Summed in bf16, 64 pieces would lose a part in a hundred."""
    torch.manual_seed(0)
    head, x = nn.Linear(16, 64), torch.randn(2, 64, 16, requires_grad=True)
    targets = torch.randint(64, (2, 64))
    gradients = []
    for most in (1000, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = in_pieces(head, x, targets, most)
        gradients.append(torch.autograd.grad(loss, [x, head.weight]))
    want = torch.autograd.grad(cross_entropy(head.double()(x.double()), targets), [x, head.weight])
    for whole, pieces, exact in zip(*gradients, want, strict=True):
        assert pieces.dtype == whole.dtype
        errors = [(g.double() - exact).norm() / exact.norm() for g in (whole, pieces)]
        assert errors[1] <= 1.2 * errors[0] + 1e-3
    head.float()


def test_a_head_that_draws_draws_the_same_again() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 11, bias=False))
    x, targets = torch.randn(1, 12, 8, requires_grad=True), torch.randint(11, (1, 12))
    torch.manual_seed(3)
    (got,) = torch.autograd.grad(in_pieces(head, x, targets, 5), x)
    torch.manual_seed(3)
    losses = [cross_entropy(head(x[:, i : i + 4]), targets[:, i : i + 4]) for i in (0, 4, 8)]
    (want,) = torch.autograd.grad(sum(losses) / 3, x)
    torch.testing.assert_close(got, want)


def test_pieces_where_nothing_counts() -> None:
    head, x = nn.Linear(4, 9), torch.randn(1, 6, 4, requires_grad=True)
    loss = in_pieces(head, x, torch.full((1, 6), -7), 2)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_the_logits_of_a_large_vocabulary_are_never_held_whole() -> None:
    """Live bytes at their highest, of all storages; 256 tokens of 65,536 ids are 67 MB."""
    head, x = nn.Linear(4, 65_536, bias=False), torch.randn(1, 256, 4, requires_grad=True)
    targets = torch.randint(65_536, (1, 256))
    whole, pieces = (
        peak_bytes(lambda most=most: in_pieces(head, x, targets, most).backward()) for most in (256, 16)
    )
    assert whole > 120e6
    assert pieces < whole / 6


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak_bytes(function) -> int:
    with Storages() as storages:
        function()
    return storages.peak
