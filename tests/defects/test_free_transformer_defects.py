"""The faults measured in public code of the Free Transformer, by number: none of them may come back.

Each test fails when the described behaviour is put into this library. Whether the plan is
used at all is a matter of training: ``make learn``.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from decoder_cases import N_BITS, SIZES, codes_of, make_free, tokens_of
from fem_cases import LargestTensor
from helmholtz import ops
from helmholtz.layers.latent import Plan, TablePostSampler, sample_plan
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.generation import SamplingSettings, generate, generate_planned
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.ops import binary_latent
from helmholtz.training.config import TrainConfig
from helmholtz.training.optim import learning_rate

PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]
SETTINGS = SamplingSettings(max_new_tokens=8, temperature=0, seed=2)


def bit_logits(model: FreeTransformer, tokens: Tensor, **masks: Tensor) -> Tensor:
    return model.posterior(model.lower(tokens, **masks))


@torch.no_grad()
def test_defect_01_the_encoder_gives_each_position_its_own_bits() -> None:
    """Without positions, one query for all tokens gets one answer for all tokens."""
    for model, spread in ((make_free(), 1e-2), (FreeTransformer(FreeTransformerConfig(**SIZES)), 1e-5)):
        assert bit_logits(model, tokens_of(2, 20)).std(1).min() > spread


@pytest.mark.parametrize("n_bits", [8, 12])
def test_defect_02_the_gradient_is_of_all_codes_and_not_of_the_drawn_one(n_bits: int) -> None:
    """A gradient at the drawn code alone points elsewhere, and is smaller by the probability of the code."""
    table = torch.nn.init.normal_(TablePostSampler(n_bits, 8).double().weight)
    logits = 0.1 * torch.randn(1, 64, n_bits, dtype=torch.float64)
    cotangent = torch.randn(1, 64, 8, dtype=torch.float64)
    gradients = []
    for code in (codes_of(1, 64, n_bits=n_bits), codes_of(1, 64, seed=8, n_bits=n_bits)):
        leaf = logits.clone().requires_grad_()
        gradients += torch.autograd.grad(ops.code_lookup(table, code, leaf), leaf, cotangent)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    p, bits = logits.sigmoid().unsqueeze(2), ops.code_to_bits(torch.arange(2**n_bits), n_bits).double()
    g = (bits * p + (1 - bits) * (1 - p)).prod(-1)
    exact = ((cotangent @ table.T * g).unsqueeze(-1) * (bits - p)).sum(2)
    torch.testing.assert_close(gradients[0], exact, rtol=1e-9, atol=1e-13)


@torch.no_grad()
def test_defect_04_keys_and_values_are_normed_so_that_no_plan_is_no_change() -> None:
    model = make_free()
    model.post_sampler.weight.zero_()
    plain = Transformer(TransformerConfig(**SIZES | {"n_layers": 3})).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    tokens = tokens_of(2, 20)
    torch.testing.assert_close(model(tokens, z=Plan(codes_of(2, 20))).logits, plain(tokens).logits)
    model.blocks[0].mixer.o_proj.weight.zero_(), model.blocks[0].mlp.down_proj.weight.zero_()
    before = bit_logits(model, tokens)
    model.embed.weight.mul_(1000)  # what the encoder reads is normed, too
    torch.testing.assert_close(bit_logits(model, tokens), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_defect_05_a_code_is_drawn_once_and_kept() -> None:
    """Every new token continues one text under one plan: a single pass under that plan gives them all."""
    model = make_free()
    for plain in (True, False):
        handle = None if plain else model.norm.register_forward_hook(lambda *_: None)
        for prompt, row in zip(PROMPTS, generate_planned(model, PROMPTS, SETTINGS), strict=True):
            text, plan = torch.tensor([prompt + row.tokens]), Plan(torch.tensor([row.codes]))
            logits = model(text, z=plan).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == row.tokens
        if handle is not None:
            handle.remove()


@torch.no_grad()
def test_defect_06_the_encoder_plans_the_prompt() -> None:
    model = make_free()
    model.encoder.readout.weight.mul_(1e6)  # certain of every bit
    for prompt, row in zip(PROMPTS, generate_planned(model, PROMPTS, SETTINGS), strict=True):
        certain = ops.bits_to_code(bit_logits(model, torch.tensor([prompt])) > 0)[0]
        assert row.codes[: len(prompt)] == certain.tolist()


@torch.no_grad()
def test_defect_07_the_posterior_is_sampled_in_evaluation() -> None:
    model, tokens = make_free().eval(), tokens_of(64, 10)
    model.encoder.readout.weight.mul_(0.1)
    half = model.lower(tokens)
    bits = ops.code_to_bits(model.sample_posterior(half).code, N_BITS)
    p = model.posterior(half).sigmoid()
    expected = (2 * p * (1 - p)).mean()  # of two draws that differ
    again = ops.code_to_bits(model.sample_posterior(half).code, N_BITS)
    assert abs((bits != again).float().mean() - expected) < 0.05


def test_defect_08_free_bits_are_bits_where_they_are_called_bits() -> None:
    assert ops.bits_to_nats(0.5) == pytest.approx(0.34657, abs=1e-5)
    certain = ops.kl_per_token(torch.full((3, 4), 1e4))
    assert ops.free_bits(certain, ops.bits_to_nats(4)).item() == pytest.approx(0, abs=1e-6)
    assert ops.free_bits(certain, ops.bits_to_nats(1)).item() == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [20.0, 1e3, 6e4])
def test_defect_09_certain_bits_give_finite_losses_and_gradients(dtype: torch.dtype, size: float) -> None:
    logits = (size * (2.0 * torch.randint(2, (2, 5, 8)) - 1)).to(dtype).requires_grad_()
    table = torch.randn(256, 3).to(dtype).requires_grad_()
    plan = sample_plan(logits, generator=torch.Generator())
    kl = ops.kl_per_token(logits)
    loss = ops.free_bits(kl, 0.1) + ops.code_lookup(table, plan.code, logits).square().sum()
    loss.backward()
    torch.testing.assert_close(kl, torch.full((2, 5), 8 * math.log(2)))
    assert loss.isfinite() and logits.grad.isfinite().all() and table.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_defect_10_codes_of_16_bits_are_exact_in_narrow_dtypes(dtype: torch.dtype) -> None:
    signs = torch.randint(2, (4, 250, 16))
    signs[0, 0] = 1  # all ones would round up to 65536
    plan = sample_plan((60.0 * (2 * signs - 1)).to(dtype), generator=torch.Generator())
    assert plan.code.tolist() == (signs * 2 ** torch.arange(16)).sum(-1).tolist()


def test_defect_11_the_learning_rate_falls_once() -> None:
    config = TrainConfig(steps=5000, warmup_steps=100, lr=1e-3)
    rates = [learning_rate(step, config) for step in range(5000)]
    assert all(a < b for a, b in zip(rates[:100], rates[1:100], strict=False))
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))


def test_defect_12_sampling_has_its_options_and_loses_no_prompt() -> None:
    model = make_free()
    greedy = generate(model, PROMPTS, SETTINGS)
    assert greedy == generate(model, PROMPTS, replace(SETTINGS, temperature=1.0, top_k=1))
    assert greedy == generate(model, PROMPTS, replace(SETTINGS, temperature=1.0, top_p=1e-9))
    drawn = replace(SETTINGS, temperature=2.0)
    assert generate(model, PROMPTS, drawn) == generate(model, PROMPTS, drawn)
    stop = (greedy[0][2],)
    assert (
        generate(model, PROMPTS[:1], replace(SETTINGS, stop_tokens=stop))[0]
        == greedy[0][: greedy[0].index(stop[0])]
    )
    with pytest.raises(
        ValueError, match=r"prompts\[0\]: 60 tokens and max_new_tokens=8 exceed max_seq_len=64"
    ):
        generate(model, [[1] * 60], SETTINGS)


def test_defect_13_no_tensor_holds_a_number_per_token_and_code() -> None:
    """At 16 bits and 512 tokens a one-hot has 34 million elements; inference needs none with a number per code."""
    model = make_free(n_latent_bits=16, d_model=8, n_heads=2, max_seq_len=512)
    tokens = tokens_of(1, 512)
    with LargestTensor() as largest:
        half = model.lower(tokens)
        plan = model.sample_posterior(half, generator=torch.Generator())
        model.upper(half, plan).logits.square().sum().backward()
    assert largest.elements <= max(512 << binary_latent.TILE_BITS, 2**16 * 8) < 2**16 * 512
    with torch.no_grad(), LargestTensor() as largest:
        state = model.step(tokens[:, :100], model.init_state(1)).state
        model.step(tokens[:, 100:101], state)
        generate(model, PROMPTS, SETTINGS)
    assert largest.elements < 2**16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_defect_14_the_encoder_has_the_decoders_heads(groups: int) -> None:
    model = make_free(n_kv_heads=groups)
    encoder, block = model.encoder.block, model.blocks[1]
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in (encoder, block)]
    assert shapes[0] == shapes[1] and encoder.mixer.n_kv_heads == groups
    assert not encoder.mixer.causal and encoder.mixer.rope_theta == block.mixer.rope_theta
    assert not list(model.buffers()), "rotary tables are not state"


def test_defect_15_every_key_of_a_config_acts_or_is_refused() -> None:
    for name in ("attention_dropout", "use_rmsnorm", "use_swiglu", "hidden_dim"):
        with pytest.raises(ValueError, match=f"no key '{name}'"):
            FreeTransformerConfig.from_dict({"vocab_size": 9, name: 1})
    wet = make_free(dropout=0.5).train()
    half = wet.lower(tokens_of(1, 9))
    assert not torch.equal(wet.posterior(half), wet.posterior(half))


def test_defect_16_the_feed_forward_is_as_wide_as_the_model_asks() -> None:
    assert FreeTransformerConfig(vocab_size=9, d_model=128).d_ff == 344


def test_defect_17_pads_are_neither_read_by_the_encoder_nor_paid_for() -> None:
    model, mask = make_free(), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    tokens = tokens_of(2, 7)
    kl = ops.kl_per_token(bit_logits(model, tokens, attention_mask=mask))
    alone = [ops.kl_per_token(bit_logits(model, tokens[row : row + 1, mask[row]]))[0] for row in range(2)]
    expected = torch.cat(alone).mean()
    torch.testing.assert_close(ops.free_bits(kl, 0.0, mask=mask), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_defect_18_what_is_compared_with_a_baseline_does_not_leak() -> None:
    """``model(tokens)`` knows nothing of later tokens; under the posterior's plan it does, and may not be compared."""
    model = make_free()
    tokens, others = tokens_of(2, 12), tokens_of(2, 12)
    others[:, 6:] = 36 - tokens[:, 6:]
    found = []
    for text in (tokens, others):
        torch.manual_seed(3)
        found.append(model(text).logits[:, :6])
    assert torch.equal(*found)
    plans = [model.encode(text, generator=torch.Generator().manual_seed(1)) for text in (tokens, others)]
    leaking = [model(text, z=z).logits[:, :6] for text, z in zip((tokens, others), plans, strict=True)]
    assert not torch.equal(*leaking)
