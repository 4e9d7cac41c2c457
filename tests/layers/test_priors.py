"""The contract of a prior: averages with weights that are a distribution, recovered from one-hot signals."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from fem_cases import Given, difference, make_mixer, prior_features, tokens
from fem_oracle import prior_weights
from helmholtz.layers.fem_config import PRIORS
from helmholtz.layers.sequence import sequence_layout

every_prior = pytest.mark.parametrize("prior", PRIORS)
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
TIME = 11

DECAYS = {
    "gla, one decay per channel": ("gla", {"decay": "channel"}),
    "grouped": ("softmax", {"n_heads": 4, "n_kv_heads": 2}),
}
CASES = {**{prior: (prior, {}) for prior in PRIORS}, **DECAYS}
every_case = pytest.mark.parametrize("case", CASES)


def build(case, **options):
    prior, extra = CASES[case]
    return make_mixer(prior, **{**extra, **options}).double()


def average(mixer, features, signals, layout):
    """What the prior makes of ``B G T S V``."""
    values = signals.new_zeros(signals.shape[0], signals.shape[1], signals.shape[2], signals.shape[-1])
    return mixer.prior(features, values, Given(signals), layout, layout, None)[0]


def one_hots(mixer, batch, time):
    shape = (batch, mixer.config.n_kv_heads, time, time, mixer.config.d_head_v)
    return torch.eye(time, dtype=torch.float64)[None, None, :, :, None].expand(shape)


def weights(mixer, features, layout):
    """``B H T S V``, from one-hot positions on the signal dimension."""
    batch, time = next(iter(features.values())).shape[:2]
    return average(mixer, features, one_hots(mixer, batch, time), layout)


def layout_of(time=TIME, batch=2, **masks):
    return sequence_layout(torch.zeros(batch, time, 1), **masks)


@every_case
@both_ways
def test_weights_are_a_distribution_over_the_visible_tokens(case, causal):
    mixer = build(case, causal=causal)
    p = weights(mixer, prior_features(mixer, 2, TIME), layout_of())
    assert p.shape == (2, mixer.config.n_heads, TIME, TIME, mixer.config.d_head_v)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(3), torch.ones_like(p.sum(3)), rtol=1e-12, atol=1e-12)
    future = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    assert (p[:, :, future] == 0).all() if causal else (p[:, :, future] > 0).all()


@every_case
@both_ways
def test_pads_have_no_weight_and_a_query_without_keys_has_none(case, causal):
    mixer = build(case, causal=causal)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0], [0] * TIME]).bool()
    features = prior_features(mixer, 2, TIME)
    p = weights(mixer, features, layout_of(attention_mask=mask))
    real = p[0][:, mask[0]]
    assert (real[:, :, ~mask[0]] == 0).all()
    torch.testing.assert_close(real.sum(2), torch.ones_like(real.sum(2)), rtol=1e-12, atol=1e-12)
    dense = {name: feature[:1, mask[0]] for name, feature in features.items()}
    alone = weights(mixer, dense, layout_of(int(mask.sum()), 1))
    assert difference(real[:, :, mask[0]], alone[0]) < 1e-9
    if case != "mamba":  # its skip term reads the pad itself, whose output the layer drops
        assert (p[1] == 0).all()


@every_case
@both_ways
def test_packed_sequences_share_no_weight(case, causal):
    mixer = build(case, causal=causal)
    features = prior_features(mixer, 1, TIME)
    leaves = [feature.requires_grad_() for feature in features.values()]
    p = weights(mixer, features, layout_of(batch=1, cu_seqlens=torch.tensor([0, 1, 6, TIME])))
    cotangent = torch.randn_like(p)
    gradients = torch.autograd.grad((p * cotangent).sum(), leaves, materialize_grads=True)
    p = p.detach()
    for start, stop in [(0, 1), (1, 6), (6, TIME)]:
        part = {name: feature[:, start:stop] for name, feature in features.items()}
        alone = weights(mixer, part, layout_of(stop - start, 1))
        assert difference(p[:, :, start:stop, start:stop], alone) < 1e-9
        its_own = (alone * cotangent[:, :, start:stop, start:stop]).sum()
        wanted = torch.autograd.grad(its_own, leaves, materialize_grads=True)
        for both in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(*(x[:, start:stop] for x in both), rtol=1e-9, atol=1e-12)
        p[:, :, start:stop, start:stop] = 0
    assert (p == 0).all()


@every_case
@both_ways
def test_packed_sequences_are_averaged_without_a_look_at_values(case, causal):
    mixer = build(case, causal=causal)
    with FakeTensorMode() as fake:
        tensors = {name: fake.from_tensor(x) for name, x in mixer.named_parameters()}
        x, bounds = (
            fake.from_tensor(x) for x in (tokens(1, TIME, dtype=torch.float64), torch.tensor([0, 5, TIME]))
        )
        y = functional_call(mixer, tensors, (x,), {"cu_seqlens": bounds})
        assert y.shape == x.shape
        y.sum().backward()
    assert all(x.grad is not None for x in tensors.values())


@every_case
@both_ways
def test_averages_are_linear_in_the_signals_and_all_signals_share_the_weights(case, causal):
    mixer = build(case, causal=causal)
    features = prior_features(mixer, 2, TIME)
    p = weights(mixer, features, layout_of())
    c = mixer.config
    signals = torch.randn(2, c.n_kv_heads, TIME, 3, c.d_head_v, dtype=torch.float64)
    mixed = average(mixer, features, signals, layout_of())
    repeated = signals.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
    assert difference(mixed, torch.einsum("bhtsv,bhsnv->bhtnv", p, repeated)) < 1e-12


@every_case
@both_ways
@pytest.mark.parametrize("rotary", [True, False])
def test_weights_are_those_of_the_equations(case, causal, rotary):
    rotary = rotary and CASES[case][0] != "mamba"  # mamba has no queries to rotate
    mixer = build(case, causal=causal, rope_theta=100.0 if rotary else 0.0)
    x = tokens(2, TIME, dtype=torch.float64)
    features, _ = mixer.project(x, sequence_layout(x))
    p = weights(mixer, features, sequence_layout(x))
    for row, row_weights in zip(x, p, strict=True):
        expected = prior_weights(mixer, row).expand_as(row_weights)
        assert difference(row_weights, expected) < (1e-5 if rotary else 1e-12)


@every_prior
def test_only_the_two_channelwise_priors_weigh_channels_differently(prior):
    mixer = build(prior)
    p = weights(mixer, prior_features(mixer, 1, TIME), layout_of(batch=1))
    same = difference(p, p[..., :1].expand_as(p)) < 1e-12
    assert same == (prior in ("softmax", "linear", "gla"))


@every_prior
def test_weights_have_the_gradient_of_the_equations(prior):
    rope = {} if prior == "mamba" else {"rope_theta": 0.0}
    mixer = build(prior, **rope)
    x = tokens(1, 6, dtype=torch.float64).requires_grad_()
    features, _ = mixer.project(x, sequence_layout(x))
    p = weights(mixer, features, sequence_layout(x))
    cotangent = torch.randn_like(p)
    (got,) = torch.autograd.grad((p * cotangent).sum(), x)
    (want,) = torch.autograd.grad((prior_weights(mixer, x[0]) * cotangent[0]).sum(), x)
    assert difference(got, want) < 1e-9


@every_prior
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_extreme_features_still_give_a_distribution(prior, size):
    """In float32: peaked weights, dead features and vanished decays are distributions too."""
    mixer = make_mixer(prior)
    features = {name: size * f.float() for name, f in prior_features(mixer, 2, 40).items()}
    p = weights(mixer, features, layout_of(40))
    assert p.isfinite().all() and (p >= 0).all()
    torch.testing.assert_close(p.sum(3), torch.ones_like(p.sum(3)), rtol=1e-5, atol=1e-5)


@every_prior
def test_values_and_features_that_vanish_leave_a_distribution(prior):
    """Dead features (defect of a floor under the normaliser): weights still sum to one."""
    mixer = make_mixer(prior)
    features = {name: torch.full_like(f, -50.0).float() for name, f in prior_features(mixer, 1, 20).items()}
    total: Tensor = weights(mixer, features, layout_of(20, 1)).sum(3)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
