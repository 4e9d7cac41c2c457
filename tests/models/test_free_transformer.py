"""The Free Transformer against its equations in float64, its configuration, its parameters, and what it refuses."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoder_cases import N_BITS, SIZES, codes_of, make_free, tokens_of
from free_transformer_oracle import doubled, free_transformer
from helmholtz import ops
from helmholtz.layers.latent import Plan
from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig, control, small
from helmholtz.models.outputs import LMState
from helmholtz.models.transformer import Transformer
from helmholtz.ops.row_random import row_keys
from helpers import assert_matches

VARIANTS = [
    {},
    {"n_kv_heads": 2, "tie_embeddings": False},
    {"n_kv_heads": 1, "n_layers": 4, "split_layer": 3, "n_latent_bits": 8},
    {"post_sampler": "bits", "n_layers": 2, "n_latent_bits": 1},
]
BUDGET = 40.0  # worst measured: 11 eps, of a gradient
every_variant = pytest.mark.parametrize("fields", VARIANTS, ids=str)


@every_variant
def test_logits_match_the_equations(fields: dict) -> None:
    model = make_free(**fields)
    tokens, code = tokens_of(2, 14), codes_of(2, 14, n_bits=model.config.n_latent_bits)
    half = model.lower(tokens)
    logits, bits = model.upper(half, Plan(code)).logits, model.posterior(half)
    for row in range(2):
        expected = free_transformer(tokens[row], code[row], doubled(model), model.config)
        assert_matches("logits", logits[row], expected[0], budget=BUDGET)
        assert_matches("bit logits", bits[row], expected[1], budget=BUDGET)


@every_variant
def test_gradients_match_the_equations_with_dense_codes(fields: dict) -> None:
    """Of reconstruction and free bits, into every parameter; the lookup against one-hot rows of all codes."""
    model = make_free(**fields)
    tokens, code = tokens_of(1, 14), codes_of(1, 14, n_bits=model.config.n_latent_bits)
    cotangent = torch.randn(14, 37, dtype=torch.float64)

    def loss(logits: Tensor, bits: Tensor) -> Tensor:
        return (logits.double() * cotangent).sum() + 5 * ops.free_bits(ops.kl_per_token(bits), 0.1)

    half = model.lower(tokens)
    bits = model.posterior(half)
    loss(model.upper(half, Plan(code, bits)).logits[0], bits[0]).backward()
    weights = doubled(model)
    loss(*free_transformer(tokens[0], code[0], weights, model.config)).backward()
    for name, parameter in model.named_parameters():
        assert weights[name].grad is not None and weights[name].grad.any(), name
        assert_matches(name, parameter.grad, weights[name].grad, budget=BUDGET)


def test_a_call_without_a_plan_draws_it_from_the_prior() -> None:
    model, tokens = make_free(), tokens_of(2, 9)
    torch.manual_seed(4)
    logits = model(tokens).logits
    torch.manual_seed(4)
    plan = model.sample_prior(2, 9)
    assert plan.logits is None
    assert torch.equal(logits, model(tokens, z=plan).logits)
    assert not torch.equal(logits, model(tokens).logits)
    torch.manual_seed(4)
    streamed = model.step(tokens, model.init_state(2))
    assert isinstance(streamed.state, LMState) and torch.equal(streamed.state.plan.code, plan.code)
    torch.testing.assert_close(streamed.logits, logits)


@pytest.mark.parametrize("way", ["generator", "global", "by row"])
def test_the_prior_is_uniform(way) -> None:
    model = make_free(n_latent_bits=4)
    torch.manual_seed(1)
    given = {"generator": torch.Generator().manual_seed(1)} if way == "generator" else {}
    keys = row_keys(1, torch.arange(20))
    with drawn_by_row(keys) if way == "by row" else nullcontext():
        counts = model.sample_prior(20, 400, **given).code.flatten().bincount(minlength=16)
    assert len(counts) == 16
    assert ((counts - 500.0) ** 2 / 500).sum() < 37.7  # chi-squared, 15 degrees of freedom, 0.999


def test_the_prior_draws_from_a_generator_and_is_as_wide_as_its_bits() -> None:
    model = make_free(n_latent_bits=4)
    first, again, other = (
        model.sample_prior(20, 400, generator=torch.Generator().manual_seed(seed)).code for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    wide = make_free(n_latent_bits=16).sample_prior(10, 1000).code
    assert wide.max() > 60000 and wide.min() < 5000


def test_encode_draws_from_the_posterior_of_the_whole_text() -> None:
    model, tokens = make_free(), tokens_of(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    for masks in ({}, {"attention_mask": mask}):
        first, second = (
            model.encode(tokens, generator=torch.Generator().manual_seed(3), **masks) for _ in range(2)
        )
        half = model.lower(tokens, **masks)
        assert first.logits is not None
        assert torch.equal(first.logits, model.posterior(half)) and torch.equal(first.code, second.code)
        expected = model.sample_posterior(half, generator=torch.Generator().manual_seed(3))
        assert torch.equal(first.code, expected.code)
    torch.manual_seed(8)
    first = model.encode(tokens)
    torch.manual_seed(8)
    assert torch.equal(first.code, model.encode(tokens).code)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models_have_exact_codes_and_finite_gradients(dtype: torch.dtype) -> None:
    model = make_free(n_latent_bits=16).to(dtype).train()
    tokens = tokens_of(2, 20)
    half = model.lower(tokens[:, :-1])
    plan = model.sample_posterior(half, generator=torch.Generator().manual_seed(0))
    assert plan.logits is not None and plan.logits.dtype == dtype
    bits = ops.sample_bits(plan.logits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.code_to_bits(plan.code, 16), bits)
    kl = ops.kl_per_token(plan.logits)
    assert kl.dtype == torch.float32
    loss = ops.cross_entropy(model.upper(half, plan).logits, tokens[:, 1:]) + ops.free_bits(kl, 0.1)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_checkpoint_gives_the_same_logits_and_plans(tmp_path: Path) -> None:
    model = make_free(n_kv_heads=2, n_layers=5, split_layer=1, post_sampler="bits")
    save_checkpoint(model, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a")
    assert isinstance(loaded, FreeTransformer) and loaded.config == model.config
    tokens, code = tokens_of(2, 9), codes_of(2, 9)
    assert torch.equal(loaded(tokens, z=Plan(code)).logits, model(tokens, z=Plan(code)).logits)
    assert torch.equal(loaded.posterior(loaded.lower(tokens)), model.posterior(model.lower(tokens)))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("post_sampler", ["table", "bits"])
@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_the_plan_costs_a_block_a_query_a_readout_and_the_codes(
    bits: int, post_sampler: str, n_kv_heads: int
) -> None:
    width, d_ff = 32, 80
    sizes = SIZES | {"n_layers": 3, "d_ff": d_ff, "n_kv_heads": n_kv_heads}
    with torch.device("meta"):
        model = FreeTransformer(
            FreeTransformerConfig(**sizes, n_latent_bits=bits, post_sampler=post_sampler)  # type: ignore[arg-type]
        )
        plain = Transformer(Transformer.config_class(**sizes))
    block = 2 * width**2 + 2 * width * (width // 4 * n_kv_heads) + 3 * width * d_ff + 2 * width
    encoder = block + width + width * bits + width
    codes = width * (2**bits if post_sampler == "table" else bits)
    assert count(model) == count(plain) + encoder + codes
    assert count(model.encoder) == encoder and count(model.post_sampler) == codes


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 2, "tie_embeddings": False}, {"post_sampler": "bits"}], ids=str
)
def test_the_control_has_the_parameters_and_no_plan(extra: int, fields: dict) -> None:
    config = FreeTransformerConfig(vocab_size=65, d_model=128, n_layers=4, **fields)
    matched = control(config, extra_layers=extra)
    assert matched.n_layers == 4 + extra and (matched.n_heads, matched.n_kv_heads) == (
        config.n_heads,
        config.n_kv_heads,
    )
    with torch.device("meta"):
        ours, theirs = count(FreeTransformer(config)), count(Transformer(matched))
    assert abs(theirs - ours) <= 3 * 128 * (4 + extra) / 2, "the nearest feed-forward width"
    assert abs(theirs / ours - 1) < 0.002


def test_a_control_of_a_huge_table_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"d_ff must be at most twice the model's 344, for a control of .* parameters"
    ):
        control(FreeTransformerConfig(vocab_size=65, d_model=128, n_latent_bits=16))


def test_the_config_is_filled_in_and_round_trips() -> None:
    for n_layers, split in [(2, 1), (3, 1), (4, 2), (5, 2), (7, 3)]:
        config = FreeTransformerConfig(vocab_size=5, n_layers=n_layers)
        assert config.split_layer == split
        assert FreeTransformerConfig.from_dict(config.to_dict()) == config
    assert small(65).n_latent_bits == 8 and small(65).d_model == 128


@pytest.mark.parametrize("n_layers", [2, 3, 4, 5])
@torch.no_grad()
def test_the_plan_may_enter_any_block_but_the_first(n_layers: int) -> None:
    tokens, code = tokens_of(1, 9), codes_of(1, 9)
    seen = []
    for split in range(1, n_layers):
        model = make_free(n_layers=n_layers, split_layer=split)
        seen.append(model(tokens, z=Plan(code)).logits)
        expected, bits = free_transformer(tokens[0], code[0], doubled(model), model.config)
        torch.testing.assert_close(seen[-1][0].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model.posterior(model.lower(tokens))[0].double(), bits, rtol=1e-4, atol=1e-4
        )
    assert all(not torch.equal(seen[0], other) for other in seen[1:])


CONFIGS = {
    "bits 0": ({"n_latent_bits": 0}, "n_latent_bits must be an integer of at least 1, got 0"),
    "bits 17": ({"n_latent_bits": 17}, "n_latent_bits must be in 1..16, got 17"),
    "bits -1": ({"n_latent_bits": -1}, "n_latent_bits must be an integer of at least 1, got -1"),
    "bits true": ({"n_latent_bits": True}, "n_latent_bits must be an integer of at least 1, got True"),
    "one layer": ({"n_layers": 1}, "n_layers must be an integer of at least 2, got 1"),
    "split 0": ({"split_layer": 0}, "split_layer must be an integer of at least 1, got 0"),
    "split 4": ({"n_layers": 4, "split_layer": 4}, "split_layer must be at most n_layers - 1 = 3: .*, got 4"),
    "sampler": ({"post_sampler": "tabel"}, "post_sampler must be one of .*'tabel'; did you mean 'table'"),
    "unknown": ({"n_latent_bit": 4}, "no key 'n_latent_bit'; did you mean 'n_latent_bits'"),
    "heads": ({"n_heads": 3}, "n_heads must divide d_model"),
    "odd head": ({"d_model": 12, "n_heads": 4}, "d_model / n_heads must be even"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configurations_are_refused_by_name(case: str) -> None:
    fields, message = CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        FreeTransformerConfig.from_dict(SIZES | fields)


def unchecked(code: Tensor, logits: Tensor | None = None) -> Plan:
    """A plan past the shape checks of the tests, which users do not have."""
    plan = object.__new__(Plan)
    object.__setattr__(plan, "code", code)
    object.__setattr__(plan, "logits", logits)
    return plan


GOOD, BITS = codes_of(2, 9), torch.zeros(2, 9, N_BITS)
PLANS = {
    "too short": ((GOOD[:, :8],), r"z.code must be of shape \(2, 9\) as the tokens, got \(2, 8\)"),
    "one row": ((GOOD[:1],), r"z.code must be of shape \(2, 9\) as the tokens, got \(1, 9\)"),
    "no batch": ((GOOD[0],), r"z.code must be of shape \(2, 9\) as the tokens, got \(9,\)"),
    "too large": ((GOOD + 32,), r"z.code must be in \[0, 32\), got 'values from"),
    "negative": ((GOOD - 32,), r"z.code must be in \[0, 32\), got 'values from -"),
    "float": ((GOOD.float(),), "z.code must be of an integer dtype, got torch.float32"),
    "bool": ((GOOD.bool(),), "z.code must be of an integer dtype, got torch.bool"),
    "complex": ((GOOD.cfloat(),), "z.code must be of an integer dtype, got torch.complex64"),
    "logits": ((GOOD, BITS[..., :4]), r"z.logits must be of shape \(2, 9, 5\), got \(2, 9, 4\)"),
    "logits of one row": ((GOOD, BITS[:1]), r"z.logits must be of shape \(2, 9, 5\), got \(1, 9, 5\)"),
}


@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("post_sampler", ["table", "bits"])
def test_bad_plans_are_refused_by_name(case: str, post_sampler: str) -> None:
    model, tokens = make_free(post_sampler=post_sampler), tokens_of(2, 9)
    parts, message = PLANS[case]
    for call in (lambda z: model(tokens, z=z), lambda z: model.step(tokens, model.init_state(2), z=z)):
        with pytest.raises(ValueError, match=message):
            call(unchecked(*parts))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
def test_codes_of_every_integer_dtype_are_taken(dtype: torch.dtype) -> None:
    for post_sampler in ("table", "bits"):
        model, tokens = make_free(post_sampler=post_sampler), tokens_of(2, 9)
        assert torch.equal(model(tokens, z=Plan(GOOD.to(dtype))).logits, model(tokens, z=Plan(GOOD)).logits)


def test_too_many_tokens_are_refused() -> None:
    model = make_free()
    for call in (model, model.encode, lambda tokens: model.step(tokens, model.init_state(1))):
        with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than max_seq_len=64"):
            call(tokens_of(1, 65))


def test_a_negative_kappa_is_refused() -> None:
    with pytest.raises(ValueError, match="kappa must be a finite number of at least 0, got -0.5"):
        ops.free_bits(ops.kl_per_token(BITS), -0.5)
