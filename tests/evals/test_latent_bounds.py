import itertools
import math
import statistics

import pytest
import torch

from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.language import evaluate_language, text_stream
from helmholtz.evals.latent import PRIOR_DRAWS, evaluate_bounds, report
from helmholtz.layers.latent import Plan
from helmholtz.models.base import evaluation_mode
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.ops.code_usage import code_usage
from tiny_runs import prepare_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TokenDataset(prepare_text(tmp_path_factory.mktemp("text")).folder, "validation")


def free_transformer(n_latent_bits, *, table=2.0, readout=0.5, **changes):
    """A model whose plan matters and whose posterior is neither the prior nor certain."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "dropout": 0.3}
    model = FreeTransformer(FreeTransformerConfig(**sizes | changes, n_latent_bits=n_latent_bits))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
        model.post_sampler.weight.normal_(std=table)
        model.encoder.readout.weight.normal_(std=readout)
    return model


def every_plan(model, tokens, targets):
    """Of all plans of a text: log p(x|z), log p(z), log q(z|x), in float64."""
    n = targets.shape[0]
    codes = torch.tensor(list(itertools.product(range(2**model.config.n_latent_bits), repeat=n)))
    with evaluation_mode(model):
        half = model.lower(tokens.expand(len(codes), -1))
        scores = model.upper(half, Plan(codes)).logits.double().log_softmax(-1)
        log_likelihood = scores[:, torch.arange(n), targets].sum(1)
        logits = model.posterior(half).double()
    bits = (codes.unsqueeze(-1) >> torch.arange(model.config.n_latent_bits)) & 1
    log_q = torch.nn.functional.logsigmoid((2 * bits - 1) * logits).sum((1, 2))
    return log_likelihood, torch.full_like(log_q, -math.log(len(codes))), log_q


@pytest.mark.parametrize(("n_latent_bits", "seq_len"), [(1, 6), (2, 3)])
def test_every_number_is_within_its_noise_of_the_sum_over_all_plans(data, n_latent_bits, seq_len):
    model, stream, k = free_transformer(n_latent_bits, readout=0.15), text_stream(data), 400
    log_x, log_p, log_q = every_plan(model, stream[None, :seq_len], stream[1 : seq_len + 1])
    exact = (log_x + log_p).logsumexp(0)
    q, prior, ratio = log_q.exp(), log_p.exp(), (log_x + log_p - log_q - exact).exp()
    assert q.sum() == pytest.approx(1) and (q * ratio).sum() == pytest.approx(1)

    found = evaluate_bounds(model, data, seq_len=seq_len, n_samples=k, n_windows=1)
    spread = ((q * ratio**2).sum() - 1).item()  # relative variance of one weight
    noise = (spread / k) ** 0.5
    assert 0.01 < noise < 0.2
    # the average weight is unbiased: this is the bound itself, not only its limit
    assert math.exp(-found.importance_weighted * seq_len - exact.item()) == pytest.approx(1, abs=4 * noise)
    # the same of the mixture, from both kinds of plans
    mixed = (log_x + log_p - exact).exp() * (k + PRIOR_DRAWS) / (k * q + PRIOR_DRAWS * prior)
    assert (k * q + PRIOR_DRAWS * prior) @ mixed == pytest.approx(k + PRIOR_DRAWS)
    variances = [(w * mixed**2).sum() - (w * mixed).sum() ** 2 for w in (q, prior)]
    deviation = (k * variances[0] + PRIOR_DRAWS * variances[1]).sqrt().item() / (k + PRIOR_DRAWS)
    assert 0.01 < deviation < 0.2
    assert math.exp(-found.mixture_weighted * seq_len - exact.item()) == pytest.approx(1, abs=4 * deviation)
    assert found.effective_samples / k == pytest.approx(1 / (1 + spread), rel=0.15)

    kl = (q * (log_q - log_p)).sum().item()
    assert found.kl * seq_len == pytest.approx(kl, rel=1e-6)
    one = {"seq_len": seq_len, "n_samples": 1, "n_windows": 1}
    priors = [evaluate_bounds(model, data, **one, seed=seed).prior_cross_entropy for seed in range(30)]
    for value, weight, draws in (
        (found.posterior_cross_entropy, q, k),
        (statistics.fmean(priors), prior, 30 * PRIOR_DRAWS),
    ):
        mean = -(weight * log_x).sum()
        deviation = (weight * (log_x + mean) ** 2).sum().sqrt().item()
        assert deviation > 0.1
        assert value * seq_len == pytest.approx(mean.item(), abs=4 * deviation / draws**0.5)
    # the exact bounds are bounds, and the posterior's cross-entropy alone is not one
    assert -(q * log_x).sum() + kl > -exact and -(prior * log_x).sum() > -exact
    assert found.elbo == pytest.approx(found.posterior_cross_entropy + found.kl)


def test_the_posterior_cross_entropy_alone_can_be_below_what_the_text_costs(data):
    model = free_transformer(1)
    stream, n = text_stream(data), 6
    tokens, targets = stream[None, :n], stream[1 : n + 1]
    log_x, log_p, _ = every_plan(model, tokens, targets)
    best = log_x.argmax().item()
    with torch.no_grad():  # an encoder that has found the plan that fits this text best
        code = torch.tensor(list(itertools.product((0, 1), repeat=n)))[best]
    model.posterior = lambda half: ((2 * code - 1) * 4.0)[None, :, None].expand(len(half.x), -1, -1)
    found = evaluate_bounds(model, data, seq_len=n, n_samples=200, n_windows=1)
    exact = -(log_x + log_p).logsumexp(0).item() / n
    assert found.posterior_cross_entropy < exact - 0.01
    assert found.elbo > exact


def test_a_table_of_zeros_gives_the_number_of_a_decoder_without_a_plan(data):
    model = free_transformer(3, table=0.0)
    plain = evaluate_language(model, data, seq_len=32, overlap=0)
    decoder = Transformer(
        TransformerConfig(vocab_size=257, d_model=16, n_layers=2, n_heads=2, max_seq_len=64, dropout=0.3)
    )
    decoder.load_state_dict(model.state_dict(), strict=False)
    other = evaluate_language(decoder, data, seq_len=32, overlap=0)
    assert (other.n_tokens, other.n_bytes) == (plain.n_tokens, plain.n_bytes)
    assert other.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-6)
    found = evaluate_bounds(model, data, seq_len=32, n_samples=4)
    assert found.n_tokens == plain.n_tokens == len(data) and found.n_windows == -(-len(data) // 32)
    assert len(data) % 32  # the last window is a short one
    assert found.prior_cross_entropy == pytest.approx(plain.nats_per_token, rel=1e-6)
    assert found.posterior_cross_entropy == pytest.approx(plain.nats_per_token, rel=1e-6)
    assert found.elbo == pytest.approx(plain.nats_per_token + found.kl, rel=1e-6)
    assert found.kl > 0.01 and plain.nats_per_token < found.importance_weighted < found.elbo


def test_a_posterior_that_is_the_prior_pays_nothing_and_weighs_all_plans_by_their_likelihood(data):
    model = free_transformer(3, table=0.0, readout=0.0)
    plain = evaluate_language(model, data, seq_len=32, overlap=0).nats_per_token
    found = evaluate_bounds(model, data, seq_len=32, n_samples=5)
    assert (found.kl, found.usage.active_bits) == (0, 0)
    assert found.effective_samples == pytest.approx(5)
    assert found.importance_weighted == pytest.approx(plain, rel=1e-6)
    assert found.mixture_weighted == pytest.approx(plain, rel=1e-6)
    assert found.elbo == pytest.approx(plain, rel=1e-6)


def test_the_mixture_is_tight_where_the_posterior_is_sure_of_a_plan_that_says_nothing(data):
    model = free_transformer(3, table=0.0, readout=3.0)
    plain = evaluate_language(model, data, seq_len=32, overlap=0).nats_per_token
    found = evaluate_bounds(model, data, seq_len=32, n_samples=8)
    assert found.kl > 1 and found.importance_weighted > plain + 0.5
    assert found.mixture_weighted == pytest.approx(plain, rel=1e-4)


def test_the_importance_weighted_bound_starts_at_the_elbo_and_falls_with_more_samples(data):
    model, many = free_transformer(2), {}
    for k in (1, 4, 16):
        settings = {"seq_len": 8, "n_samples": k, "n_windows": 60, "batch_size": 60}
        runs = [evaluate_bounds(model, data, **settings, seed=seed) for seed in range(8)]
        many[k] = [run.importance_weighted for run in runs]
        noise = statistics.stdev(many[k]) / 8**0.5
        elbo = statistics.fmean(run.elbo for run in runs)
        if k == 1:
            assert statistics.fmean(many[k]) == pytest.approx(elbo, abs=4 * noise)
            assert all(run.effective_samples == pytest.approx(1) for run in runs)
        else:
            assert statistics.fmean(many[k]) < elbo - 4 * noise
    assert statistics.fmean(many[1]) > statistics.fmean(many[4]) > statistics.fmean(many[16])


@pytest.mark.parametrize("post_sampler", ["table", "bits"])
def test_the_batch_size_changes_nothing_and_the_seed_something(data, post_sampler):
    torch.manual_seed(0)
    model = FreeTransformer(
        FreeTransformerConfig(
            vocab_size=257, d_model=16, n_layers=3, n_heads=2, max_seq_len=64, dropout=0.3, n_latent_bits=4,
            post_sampler=post_sampler,
        )
    )  # fmt: skip
    before = torch.get_rng_state()
    one, many = (evaluate_bounds(model, data, seq_len=50, batch_size=size, n_samples=3) for size in (1, 7))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    for name in (
        "posterior_cross_entropy",
        "prior_cross_entropy",
        "kl",
        "importance_weighted",
        "mixture_weighted",
    ):
        assert getattr(one, name) == pytest.approx(getattr(many, name), rel=1e-6)
    assert one.effective_samples == pytest.approx(many.effective_samples, rel=1e-4)
    assert one.usage.codes_used == many.usage.codes_used > 4
    other = evaluate_bounds(model, data, seq_len=50, n_samples=3, seed=1)
    assert other.kl == pytest.approx(one.kl)
    assert other.posterior_cross_entropy != one.posterior_cross_entropy
    assert other.prior_cross_entropy != one.prior_cross_entropy


def test_fewer_windows_are_spread_over_the_split_and_keep_their_numbers(data):
    model = free_transformer(2)
    total = -(-len(data) // 32)
    every = evaluate_bounds(model, data, seq_len=32, n_samples=2)
    some = evaluate_bounds(model, data, seq_len=32, n_samples=2, n_windows=3)
    assert (some.n_windows, some.n_tokens, every.n_windows) == (3, 96, total)
    stream = text_stream(data)
    rows = torch.stack([stream[32 * (i * total // 3) :][:32] for i in range(3)])
    with evaluation_mode(model):
        logits = model.posterior(model.lower(rows))
    kl = code_usage(logits, torch.zeros(3, 32, dtype=torch.long)).kl
    assert some.kl == pytest.approx(kl, rel=1e-5)
    last = evaluate_bounds(model, data, seq_len=32, n_samples=2, n_windows=total)
    assert last == every


def test_every_window_draws_plans_of_its_own(data):
    model = free_transformer(12, readout=0.0)  # uniform codes: hardly one comes twice
    usage = evaluate_bounds(model, data, seq_len=4, n_samples=1, n_windows=20).usage
    assert 70 < usage.codes_used <= 80


def test_the_usage_is_that_of_the_posterior(data):
    found = evaluate_bounds(free_transformer(3), data, seq_len=32, n_samples=1)
    usage = found.usage
    assert usage.kl == pytest.approx(found.kl) and usage.active_bits == 3
    assert 1 < usage.perplexity <= usage.codes_used <= 8
    assert 0 < usage.mutual_information <= found.kl


def test_a_report_says_what_leaks_and_counts_bits_per_byte_of_bounds_alone(data):
    found = evaluate_bounds(free_transformer(2), data, seq_len=32, n_samples=2)
    values = report(found)
    assert "posterior_cross_entropy" not in values
    assert values["posterior_cross_entropy_leaking"] == found.posterior_cross_entropy
    bits = found.elbo * found.n_tokens / math.log(2)
    assert values["elbo_bits_per_byte"] == pytest.approx(bits / data.n_bytes)
    assert {name for name in values if name.endswith("per_byte")} == {
        f"{name}_bits_per_byte"
        for name in ("prior_cross_entropy", "elbo", "importance_weighted", "mixture_weighted")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 65}, "seq_len must be at most the model's 64, got 65"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"n_windows": 0}, "n_windows must be an integer of at least 1, got 0"),
        ({"n_windows": 10**6}, "n_windows must be at most the split's"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(data, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_bounds(free_transformer(1), data, **{"seq_len": 32, "n_samples": 1} | settings)
