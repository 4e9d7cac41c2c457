"""The language-model loss against its formula, with targets that do not count."""

import math

import pytest
import torch
from torch import Tensor

from helmholtz.ops.losses import cross_entropy
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
