"""A step of a stream in one call against the calls of a whole sequence, and what it leaves to them."""

import pytest
import torch

from helmholtz import kernels
from helmholtz.layers import FreeEnergyMixer, FreeEnergyMixerConfig
from helmholtz.ops import _step
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.rope import rope_table, rotate

pytestmark = pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
PRIORS = ["softmax", "linear", "gla", "rnn_softmax", "mamba"]
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}


def stream(layer, x, split, plain=False):
    """``(y of the steps, their last state)`` after a prefill of ``split`` tokens."""
    _, state = layer.step(x[:, :split], layer.init_state(len(x)))
    parts = []
    for token in x[:, split:].split(1, dim=1):
        if plain:
            with kernels.plain_forms():
                y, state = layer.step(token, state)
        else:
            y, state = layer.step(token, state)
        parts.append(y)
    return torch.cat(parts, dim=1), state.prior


def layer_of(prior, dtype=torch.float32, **options):
    layer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=24, n_heads=3, prior=prior, **options))
    assert layer.tdc is not None
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "prior, options",
    [
        *((prior, {}) for prior in PRIORS),
        *((prior, {"read": "mean"}) for prior in PRIORS),
        ("linear", {"rope_theta": 0.0}),
        ("rnn_softmax", {"rope_theta": 0.0}),
        ("softmax", {"n_kv_heads": 1}),
        ("gla", {"decay": "channel"}),
        ("linear", {"read": "free_energy", "d_head_v": 5}),
        ("mamba", {"d_state": 3, "d_head_v": 17}),
        ("linear", {"cap": 0.1}),
        ("rnn_softmax", {"cap": 0.1}),
        ("mamba", {"cap": 0.1}),
    ],
)
@torch.no_grad()
def test_steps_are_the_calls_of_a_sequence(prior, options, dtype):
    """Outputs and states, after a prefill, from the plain forms' and from a whole pass."""
    layer = layer_of(prior, dtype, **options)
    x = torch.randn(3, 9, 24, dtype=dtype)
    y, state = stream(layer, x, 5)
    expected, plain_state = stream(layer, x, 5, plain=True)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
    torch.testing.assert_close(y, layer(x)[:, 5:], rtol=bound, atol=bound)
    for a, e in zip(tensors(state), tensors(plain_state), strict=True):
        # a sum of exponentials may be off by |beta v| times the rounding of v, little beside the largest
        scale = e.abs().max().clamp(min=1).item()
        torch.testing.assert_close(a, e, rtol=bound, atol=bound * scale)


def tensors(state):
    if torch.is_tensor(state):
        return [state]
    return [getattr(state, name) for name in ("max", "sums", "k", "v") if hasattr(state, name)]


@pytest.mark.parametrize("prior", ["linear", "gla", "rnn_softmax", "mamba"])
def test_a_step_that_is_recorded_has_its_gradient(prior):
    layer = layer_of(prior)
    x = torch.randn(1, 4, 24)
    y, _ = stream(layer, x, 3)
    (grad,) = torch.autograd.grad(y.sum(), layer.in_proj.weight)
    (expected,) = torch.autograd.grad(layer(x)[:, 3:].sum(), layer.in_proj.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_state_before_a_step_is_unchanged():
    for prior in ("linear", "rnn_softmax", "mamba"):
        layer, x = layer_of(prior), torch.randn(2, 3, 24)
        _, state = layer.step(x[:, :2], layer.init_state(2))
        first, _ = layer.step(x[:, 2:], state)
        assert torch.equal(first, layer.step(x[:, 2:], state)[0])


@torch.no_grad()
def test_what_has_no_mass_is_read_as_nothing():
    """Keys and queries that the feature map sends to 0."""
    x, v, state = -torch.rand(2, 1, 12), torch.randn(2, 3, 1, 2), torch.zeros(2, 3, 4, 5)
    mixed, last = _step.linear_step(
        x, x, v, None, torch.ones(3, 2), (None, None), state, eps=0.0, cap=40.0, temperature=1.0
    )
    assert not mixed.any() and not last.any()


@torch.no_grad()
def test_keys_without_a_weight_are_those_of_a_sequence():
    """After nothing, after such keys alone, and after others."""
    keys = torch.randn(2, 4, 6)
    keys[:, 2:, :2] = keys[:, :3, 2:4] = keys[0, :, 4] = -torch.inf
    v, state = torch.randn(2, 4, 3, 2), RNNSoftmaxState(torch.full((2, 6), -torch.inf), torch.zeros(2, 2, 6))
    for t in range(4):
        k, x = keys[:, t : t + 1], v[:, t : t + 1]
        mixed, after = _step.rnn_softmax_step(k, x.transpose(1, 2), None, (None, None), state, cap=40.0)
        wanted, state = rnn_softmax(k, x.reshape(2, 1, 1, 6), state=state)
        torch.testing.assert_close(mixed.flatten(1), wanted.flatten(1))
        torch.testing.assert_close([after.max, after.sums], [state.max, state.sums])


@torch.no_grad()
@pytest.mark.parametrize("per_row", [False, True])
def test_queries_and_keys_are_turned_at_once(per_row):
    q, k = torch.randn(3, 1, 40)[..., 8:32], torch.randn(3, 1, 12)
    cos, sin = rope_table(torch.tensor([[5], [0], [900]]) if per_row else torch.tensor([5]), 6)
    turned = _step.rope_step([q, k], cos, sin)
    for x, y in zip((q, k), turned, strict=True):
        heads = x.unflatten(-1, (-1, 6)).transpose(1, 2)
        torch.testing.assert_close(y, rotate(heads, cos, sin))


@torch.no_grad()
@pytest.mark.parametrize("prior", ["linear", "rnn_softmax", "mamba"])
def test_a_row_may_have_ended(prior):
    """A masked token goes the way of a sequence, and the state of its row stays."""
    layer, x = layer_of(prior), torch.randn(2, 3, 24)
    _, state = layer.step(x[:, :2], layer.init_state(2))
    mask = torch.tensor([[True], [False]])
    y, _ = layer.step(x[:, 2:], state, attention_mask=mask)
    alone, _ = layer.step(x[:, 2:], state)
    torch.testing.assert_close(y[0], alone[0], rtol=3e-5, atol=3e-5)
    assert not y[1].any()
