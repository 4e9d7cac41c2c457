"""Identities of the free energy in float64, for the weights of every prior and for any distribution."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies

from fem_cases import Given, make_mixer, prior_features
from helmholtz.layers.fem_config import PRIORS
from helmholtz.layers.sequence import sequence_layout
from helmholtz.ops.free_energy import free_energy_from_mixed, hidden_temperature, posterior, tilt_values
from helmholtz.reference import free_energy as reference

every_prior = pytest.mark.parametrize("prior", PRIORS)
seeds = strategies.integers(0, 2**31)
temperatures = strategies.floats(0.02, 6.0)
"""Times at most 1.5 and the largest values below, the exponent stays under the cap of 80."""
TIME = 9


class Read:
    """One read of a prior: its features and values, drawn from a seed, and what comes of them."""

    def __init__(self, prior: str, seed: int, beta: float, *, spread: float = 1.0) -> None:
        self.mixer = _MIXERS[prior]
        generator = torch.Generator().manual_seed(seed)
        self.features = prior_features(self.mixer, 1, TIME, seed=seed)
        self.v = spread * torch.randn(1, 3, TIME, 4, generator=generator, dtype=torch.float64)
        self.beta = beta * (0.5 + torch.rand(3, 4, generator=generator, dtype=torch.float64))
        self.layout = sequence_layout(torch.zeros(1, TIME, 1))

    def average(self, signals):
        """What the prior makes of ``B H S N V``."""
        return self.mixer.prior(self.features, self.v, Given(signals), self.layout, self.layout, None)[0]

    def read(self, v=None, beta=None):
        """``(mean, free)`` through the ops."""
        v, beta = self.v if v is None else v, self.beta if beta is None else beta
        return free_energy_from_mixed(self.average(tilt_values(v, beta, cap=80.0)), beta)

    def weights(self):
        """``B H T V S``."""
        eye = torch.eye(TIME, dtype=torch.float64)[None, None, :, :, None]
        return self.average(eye.expand(1, 3, TIME, TIME, 4)).transpose(-1, -2)

    def expanded(self):
        """Weights, values and temperatures as ``B H T V (S)``."""
        p = self.weights()
        v = self.v.transpose(-1, -2).unsqueeze(2).expand_as(p)
        return p, v, self.beta[:, None].expand(p.shape[:-1])


_MIXERS = {prior: make_mixer(prior).double() for prior in PRIORS}


def divergence(a, b):
    """KL(a || b) along the last dimension."""
    seen = a > 0
    ratio = torch.where(seen, a, 1.0).log() - torch.where(seen & (b > 0), b, 1.0).log()
    return (a * ratio).sum(-1)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_prior
@given(seed=seeds, beta=temperatures)
@settings(max_examples=15)
def test_free_energy_is_the_mean_and_a_divergence(prior, seed, beta):
    """F = mu + KL(p || q) / b = E_q v - KL(q || p) / b."""
    case = Read(prior, seed, beta)
    mean, free = case.read()
    p, v, b = case.expanded()
    q = posterior(p, v, b)
    close(mean, (p * v).sum(-1))
    close(free, mean + divergence(p, q) / b, 1e-8)
    close(free, (q * v).sum(-1) - divergence(q, p) / b, 1e-8)
    close(q.sum(-1), torch.ones_like(free))
    assert (q[p == 0] == 0).all()


@every_prior
@given(seed=seeds, beta=temperatures)
@settings(max_examples=15)
def test_free_energy_lies_between_its_bounds(prior, seed, beta):
    """0 <= F - mu <= min(max - mu, b range^2 / 8), and F >= max + log p(argmax) / b; equality without spread."""
    case = Read(prior, seed, beta)
    mean, free = case.read()
    p, v, b = case.expanded()
    seen = torch.where(p > 0, v, -torch.inf)
    top, at_top = seen.max(-1)
    bottom = torch.where(p > 0, v, torch.inf).amin(-1)
    rounding = 1e-10 * (1 + 1 / b)
    assert (free >= mean - rounding).all() and (free <= top + rounding).all()
    assert (free - mean <= b * (top - bottom).square() / 8 + rounding).all()
    mass = p.gather(-1, at_top.unsqueeze(-1)).squeeze(-1)
    assert (free >= top + mass.log() / b - rounding).all()
    spread = (p * (v - mean.unsqueeze(-1)).square()).sum(-1)
    assert (free[spread > 1e-3] > mean[spread > 1e-3]).all()
    close(free[:, :, 0], mean[:, :, 0])
    close(mean[:, :, 0], case.v[:, :, 0])


@every_prior
@given(seed=seeds, beta=temperatures)
@settings(max_examples=10)
def test_the_slope_in_beta_is_a_divergence(prior, seed, beta):
    """dF/db = KL(q || p) / b^2."""
    case = Read(prior, seed, beta)
    b = case.beta.clone().requires_grad_()
    _, free = case.read(beta=b)
    p, v, temperature = case.expanded()
    expected = divergence(posterior(p, v, temperature), p) / temperature.square()
    assert (expected * temperature.square() >= -1e-14).all()
    (slope,) = torch.autograd.grad(free.sum(), b)
    close(slope, expected.sum((0, 2)), 1e-6)


@every_prior
@given(seed=seeds, beta=temperatures)
@settings(max_examples=10)
def test_gradients_are_the_posterior(prior, seed, beta):
    """dF/dv_i = q_i, and dF/ds_i = (q_i - p_i) / b for the logits of p."""
    case = Read(prior, seed, beta)
    p, v, b = case.expanded()
    q = posterior(p, v, b)
    leaf = case.v.clone().requires_grad_()
    _, free = case.read(v=leaf)
    for t in (0, TIME // 2, TIME - 1):
        (grad,) = torch.autograd.grad(free[:, :, t].sum(), leaf, retain_graph=True)
        close(grad, q[:, :, t].transpose(-1, -2))
    logits = torch.where(p > 0, p, 1.0).log().masked_fill(p == 0, -torch.inf).requires_grad_()
    free = ((logits.softmax(-1) * (b.unsqueeze(-1) * v).exp()).sum(-1).log() / b).sum()
    (grad,) = torch.autograd.grad(free, logits)
    close(grad, (q - p) / b.unsqueeze(-1), 1e-7)


@given(seed=seeds, beta=temperatures)
def test_the_hessian_is_the_posterior_covariance(seed, beta):
    """b (diag q - q q^T): convex, so F is 1-Lipschitz in the largest change and grows with every value."""
    torch.manual_seed(seed)
    p, v = torch.randn(6, dtype=torch.float64).softmax(-1), torch.randn(6, dtype=torch.float64)
    b = torch.tensor(beta, dtype=torch.float64)

    def free(v):
        return reference.free_energy_from_weights(p, v, b)[1]

    q = posterior(p, v, b)
    hessian = torch.autograd.functional.hessian(free, v)
    close(hessian, b * (torch.diag(q) - torch.outer(q, q)), 1e-7)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-9
    other = v + torch.randn_like(v)
    assert (free(other) - free(v)).abs() <= (other - v).abs().max() + 1e-10
    assert free(torch.maximum(other, v)) >= free(v) - 1e-10


@every_prior
@given(seed=seeds, beta=temperatures, shift=strategies.floats(-1.0, 1.0), scale=strategies.floats(0.1, 1.5))
@settings(max_examples=10)
def test_shifts_and_scales_pass_through(prior, seed, beta, shift, scale):
    """F(v + c) = F(v) + c and F(b; a v) = a F(a b; v)."""
    case = Read(prior, seed, beta)
    mean, free = case.read()
    moved_mean, moved = case.read(v=case.v + shift)
    close(moved, free + shift, 1e-8)
    close(moved_mean, mean + shift)
    _, scaled = case.read(v=scale * case.v)
    close(scaled, scale * case.read(beta=scale * case.beta)[1], 1e-8)


@every_prior
@given(seed=seeds, beta=temperatures, constant=strategies.floats(-5.0, 5.0))
@settings(max_examples=10)
def test_a_constant_is_read_as_itself(prior, seed, beta, constant):
    case = Read(prior, seed, beta)
    v = torch.full_like(case.v, constant)
    for read in case.read(v=v):
        close(read, v)


@every_prior
@given(seed=seeds)
@settings(max_examples=10)
def test_low_temperatures_expand_in_cumulants(prior, seed):
    """F = mu + b Var / 2 + b^2 kappa3 / 6 + O(b^3)."""
    case, b = Read(prior, seed, 1.0), 1e-3
    beta = torch.full_like(case.beta, b)
    mean, free = case.read(beta=beta)
    p, v, _ = case.expanded()
    centred = v - mean.unsqueeze(-1)
    variance, third = (p * centred**2).sum(-1), (p * centred**3).sum(-1)
    fourth = (p * centred**4).sum(-1) + 3 * variance**2
    error = (free - (mean + b * variance / 2 + b**2 * third / 6)).abs()
    assert (error <= b**3 * fourth / 24 * 1.5 + 1e-11).all()


@every_prior
@given(seed=seeds)
@settings(max_examples=10)
def test_high_temperatures_approach_the_maximum(prior, seed):
    case = Read(prior, seed, 1.0)
    p, v, _ = case.expanded()
    top, at_top = torch.where(p > 0, v, -torch.inf).max(-1)
    mass = p.gather(-1, at_top.unsqueeze(-1)).squeeze(-1)
    v = case.v / case.v.abs().max()  # so that beta = 70 stays below the cap
    gaps = [
        top / case.v.abs().max() - case.read(v=v, beta=torch.full_like(case.beta, b))[1]
        for b in (5.0, 20.0, 70.0)
    ]
    assert (gaps[0] >= gaps[1] - 1e-12).all() and (gaps[1] >= gaps[2] - 1e-12).all()
    assert (gaps[2] <= -mass.log() / 70.0 + 1e-10).all()


@given(seed=seeds, beta=temperatures, cut=strategies.integers(1, 8))
def test_blocks_merge_by_their_masses_and_order_does_not_matter(seed, beta, cut):
    """e^{b F} of a union is the average of its parts' by their prior masses."""
    torch.manual_seed(seed)
    p, v = torch.randn(9, dtype=torch.float64).softmax(-1), torch.randn(9, dtype=torch.float64)
    b = torch.tensor(beta, dtype=torch.float64)

    def free(p, v):
        signals = tilt_values(v.view(1, 1, -1, 1), b.view(1, 1), cap=80.0)
        mixed = torch.einsum("s,bhsnv->bhnv", p, signals).unsqueeze(2)
        return free_energy_from_mixed(mixed, b.view(1, 1))[1].squeeze()

    parts = [(p[:cut], v[:cut]), (p[cut:], v[cut:])]
    merged = sum(q.sum() * (b * free(q / q.sum(), w)).exp() for q, w in parts)
    close((b * free(p, v)).exp(), merged)
    order = torch.randperm(9)
    close(free(p[order], v[order]), free(p, v))


@every_prior
@given(seed=seeds, beta=temperatures, gate=strategies.floats(0.0, 1.0))
@settings(max_examples=10)
def test_the_hidden_temperature_reads_the_gated_value_but_not_its_gradient(prior, seed, beta, gate):
    """A unique b* in [0, b_max] with F(b*) = (1 - lam) mu + lam F(b_max); it grows with lam."""
    case = Read(prior, seed, beta)
    mean, free = case.read()
    p, v, b = case.expanded()
    lam = torch.full_like(mean, gate)
    found, above = hidden_temperature(lam, p, v, b), hidden_temperature((lam + 0.01).clamp(max=1), p, v, b)
    close(found.value, torch.lerp(mean, free, lam), 1e-8)
    varies = (p * (v - mean.unsqueeze(-1)).square()).sum(-1) > 1e-6
    assert found.beta[:, :, 0].isnan().all() and not found.beta[varies].isnan().any()
    assert (found.beta[varies] >= 0).all() and (found.beta[varies] <= b[varies]).all()
    assert (above.beta[varies] >= found.beta[varies] - 1e-9).all()
    at_star = reference.free_energy_from_weights(p, v, torch.nan_to_num(found.beta, nan=1.0).clamp(min=1e-7))[
        1
    ]
    close(at_star[varies], found.value[varies], 1e-6)


def test_equal_values_do_not_mean_equal_gradients():
    """(1 - lam) p + lam q_{b_max} is not q_{b*}: the linearised temperature is exact in value only."""
    case = Read("softmax", 0, 3.0)
    p, v, b = case.expanded()
    lam = torch.full_like(b, 0.5)
    star = hidden_temperature(lam, p, v, b)
    gated = 0.5 * p + 0.5 * posterior(p, v, b)
    assert (gated - posterior(p, v, torch.nan_to_num(star.beta)))[:, :, 1:].abs().max() > 0.05


def test_a_uniform_average_of_64_tokens_misses_the_maximum_as_the_law_says():
    """Gap to the largest of 64 normal values at b = 1, 2, 5, 20, 100 (measured over 20,000 channels)."""
    v = torch.randn(64, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta, gap in [(1.0, 1.86), (2.0, 1.43), (5.0, 0.74), (20.0, 0.20), (100.0, 0.04)]:
        free = ((beta * v).logsumexp(0) - math.log(64)) / beta
        p = torch.full((20_000, 64), 1 / 64, dtype=torch.float64)
        ours = hidden_temperature(torch.ones(20_000), p, v.T, torch.full((20_000,), beta), num_steps=1).value
        close(ours, free)
        assert abs((v.amax(0) - ours).mean() - gap) < 0.01
