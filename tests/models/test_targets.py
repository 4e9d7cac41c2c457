"""A decoder that is told the tokens to come gives their loss, and makes the logits in pieces if they are large."""

import pytest
import torch

from decoder_cases import codes_of, tokens_of
from every_decoder import DECODERS
from helmholtz.layers.latent import Plan
from helmholtz.ops.losses import cross_entropy


@pytest.mark.parametrize("name", DECODERS)
def test_a_loss_of_targets_is_the_cross_entropy_of_the_logits(name):
    """In one piece to the bit, in three to rounding, with every gradient."""
    model, tokens, targets = DECODERS[name](), tokens_of(2, 9), tokens_of(2, 9).roll(1, 1)
    targets[0, 3] = -100
    z = None if model.plan is None else Plan(codes_of(2, 9))
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = []
    for most in (None, 2**30, 4 * model.config.vocab_size * 6):
        model.logits_bytes = most
        if most is None:
            loss = cross_entropy(model(tokens, z=z).logits, targets)
        else:
            loss = model(tokens, z=z, targets=targets).nats
        found.append((loss, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (whole, gradients), (one, its), (pieces, theirs) = found
    assert one == whole
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    for a, b, c in zip(gradients, its, theirs, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert torch.equal(a, b)
            torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-6)


def test_targets_of_another_shape_are_refused():
    model = DECODERS["transformer"]()
    with pytest.raises(ValueError, match=r"targets: wanted shape \(2, 9\)"):
        model(tokens_of(2, 9), targets=tokens_of(2, 8))
    with pytest.raises(ValueError, match="targets: wanted int32 or int64"):
        model(tokens_of(2, 9), targets=tokens_of(2, 9).float())


@pytest.mark.parametrize("outside", [-1, -101, 10_000])
def test_targets_outside_the_vocabulary_are_refused(outside):
    targets = tokens_of(2, 9)
    targets[1, 3], targets[0, 0] = outside, -100
    with pytest.raises(ValueError, match=f"targets: id {outside} is not in the vocabulary .* -100"):
        DECODERS["transformer"]()(tokens_of(2, 9), targets=targets)
