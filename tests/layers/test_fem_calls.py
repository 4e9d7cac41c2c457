"""How a mixer is called: with a context, and with arguments that cannot be mixed."""

import pytest
import torch

from fem_cases import WIDTH, difference, make_mixer, tokens
from fem_oracle import mixer_output
from helmholtz.layers.fem_config import PRIORS

every_prior = pytest.mark.parametrize("prior", PRIORS)
EXACT = 1e-5


def test_the_context_takes_the_place_of_the_input():
    mixer = make_mixer("softmax", causal=False, bias=True)
    x, context = tokens(2, 5), tokens(2, 8, seed=3)
    mask, context_mask = (
        torch.tensor([[1, 1, 1, 0, 1], [1] * 5]),
        torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0] * 8]),
    )
    assert difference(mixer(x, context=x), mixer(x)) < EXACT
    assert difference(mixer(x, context=context), mixer_output(mixer, x, context=context)) < EXACT
    y = mixer(x, context=context, attention_mask=mask, context_mask=context_mask)
    expected = mixer_output(mixer, x, mask=mask, context=context, context_mask=context_mask)
    assert difference(y, expected) < EXACT


@pytest.mark.parametrize(
    "options", [{"n_heads": 4, "n_kv_heads": 2}, {"tdc_bidirectional": True}, {"read": "mean"}]
)
def test_cross_attention_with_options(options):
    mixer = make_mixer("softmax", causal=False, **options)
    x, context = tokens(2, 5), tokens(2, 8, seed=3)
    leaves = [x.requires_grad_(), context.requires_grad_(), *mixer.parameters()]
    y, expected = mixer(x, context=context), mixer_output(mixer, x, context=context)
    assert difference(y, expected) < EXACT
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), leaves)
    want = torch.autograd.grad((expected * weight).sum(), leaves)
    assert all(difference(a, b) < 1e-4 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_pads_of_the_context_influence_nothing(content):
    mixer = make_mixer("softmax", causal=False)
    x, context = tokens(2, 5), tokens(2, 8, seed=3)
    context_mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0] * 8]).bool()
    poisoned = context.masked_fill(~context_mask.unsqueeze(-1), content).requires_grad_()
    y = mixer(x, context=poisoned, context_mask=context_mask)
    assert torch.equal(y, mixer(x, context=context, context_mask=context_mask))
    (grad,) = torch.autograd.grad(y.square().sum(), poisoned)
    assert (grad[~context_mask] == 0).all() and (grad[context_mask] != 0).all()


def shape(*size):
    return torch.zeros(*size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": shape(2, 5, 7)}, r"x: wanted shape \(B, T, d_model=24\), got \(2, 5, 7\)"),
        (
            {"attention_mask": torch.ones(2, 4, dtype=torch.bool)},
            r"attention_mask: wanted shape \(2, 5\).*\(2, 4\)",
        ),
        ({"attention_mask": torch.ones(2, 5, 1, dtype=torch.long)}, r"attention_mask: wanted shape \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: wanted bool or integer.*float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: .* one row, got a batch of 2"),
        (
            {"x": shape(1, 5, WIDTH), "cu_seqlens": torch.tensor([0, 4])},
            r"cu_seqlens: .* from 0 to 5, got \[0, 4\]",
        ),
        (
            {"x": shape(1, 5, WIDTH), "cu_seqlens": torch.tensor([0, 3, 3, 5])},
            "cu_seqlens: wanted increasing",
        ),
        (
            {"x": shape(1, 5, WIDTH), "cu_seqlens": torch.tensor([0.0, 5.0])},
            "cu_seqlens: wanted a 1-D integer",
        ),
        (
            {
                "x": shape(1, 5, WIDTH),
                "cu_seqlens": torch.tensor([0, 5]),
                "attention_mask": torch.ones(1, 5).bool(),
            },
            "cu_seqlens and attention_mask exclude each other",
        ),
        ({"context_mask": torch.ones(2, 5).bool()}, "context_mask must be None: there is no context"),
        ({"context": shape(2, 3, WIDTH)}, "context: .*causal=False.*got prior='softmax', causal=True"),
    ],
)
def test_a_wrong_call_names_the_argument(call, message):
    mixer = make_mixer("softmax")
    call = {"x": shape(2, 5, WIDTH), **call}
    with pytest.raises(ValueError, match=message):
        mixer(call.pop("x"), **call)


@pytest.mark.parametrize(
    ("prior", "call", "message"),
    [
        ("linear", {"context": shape(2, 3, WIDTH)}, "context: .*prior='softmax'.*got prior='linear'"),
        ("softmax", {"context": shape(3, 3, WIDTH)}, "context: wanted 2 rows as x has, got 3"),
        ("softmax", {"context": shape(2, 3, 7)}, "context: wanted shape"),
        (
            "softmax",
            {"context": shape(2, 3, WIDTH), "context_mask": torch.ones(2, 5).bool()},
            r"mask: wanted .*\(2, 3\)",
        ),
    ],
)
def test_a_wrong_context_is_refused(prior, call, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(prior, causal=False)(shape(2, 5, WIDTH), **call)


@every_prior
def test_what_sees_the_future_has_no_stream(prior):
    mixer = make_mixer(prior, causal=False)
    with pytest.raises(ValueError, match="init_state: .*causal=False"):
        mixer.init_state(1)
    with pytest.raises(ValueError, match="state: .*causal=False"):
        mixer.step(tokens(1, 1), make_mixer(prior).init_state(1))


@every_prior
def test_a_step_checks_its_input_and_mask(prior):
    mixer = make_mixer(prior)
    with pytest.raises(ValueError, match="x: wanted shape"):
        mixer.step(shape(2, 1, 5), mixer.init_state(2))
    with pytest.raises(ValueError, match="attention_mask: wanted shape"):
        mixer.step(shape(2, 1, WIDTH), mixer.init_state(2), attention_mask=torch.ones(2, 2).bool())
