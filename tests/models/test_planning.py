"""Sampling under a plan: who plans the prompt, given codes, held bits, seeds; codes and tokens that do not mix."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder_cases import N_BITS, make_free
from helmholtz import ops
from helmholtz.layers.latent import Plan
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.generation import PlannedRow, generate, generate_planned
from helmholtz.models.planning import PlanSettings
from helmholtz.models.sampling import SamplingSettings

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
SETTINGS = SamplingSettings(max_new_tokens=10, temperature=4.0, top_k=12, seed=11)
PRIOR = PlanSettings(prompt="prior")


@pytest.fixture(params=[{}, {"n_kv_heads": 1, "post_sampler": "bits"}], ids=str)
def model(request: pytest.FixtureRequest) -> FreeTransformer:
    return make_free(**request.param)


def full_logits(model: FreeTransformer, prompt: list[int], row: PlannedRow) -> Tensor:
    """Logits of the new tokens from one pass over the whole text under the reported plan."""
    text = torch.tensor([prompt + row.tokens])
    return model(text, z=Plan(torch.tensor([row.codes]))).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("plan", [PlanSettings(), PRIOR], ids=["posterior", "prior"])
@torch.no_grad()
def test_greedy_text_is_the_likeliest_under_the_plan_that_is_reported(
    model: FreeTransformer, plan: PlanSettings
) -> None:
    rows = generate_planned(model, PROMPTS, replace(SETTINGS, temperature=0), plan)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len(row.tokens) == 10 and len(row.codes) == len(prompt) + 10
        assert full_logits(model, prompt, row).argmax(-1).tolist() == row.tokens


def test_generate_is_generate_planned(model: FreeTransformer) -> None:
    rows = generate_planned(model, PROMPTS, SETTINGS)
    assert generate(model, PROMPTS, SETTINGS) == [row.tokens for row in rows]
    assert rows == generate_planned(model, PROMPTS, SETTINGS, PlanSettings(prompt="posterior", seed=11))


@pytest.mark.parametrize("plan", [PlanSettings(), PRIOR, PlanSettings(held_bits=((2, 1),))], ids=str)
def test_a_row_alone_has_the_tokens_and_codes_it_has_in_a_batch(
    model: FreeTransformer, plan: PlanSettings
) -> None:
    rows = generate_planned(model, PROMPTS, SETTINGS, plan)
    for index, prompt in enumerate(PROMPTS):
        assert generate_planned(model, [prompt], replace(SETTINGS, seed=11 + index), plan) == [rows[index]]


def test_one_seed_gives_one_plan_and_one_text(model: FreeTransformer) -> None:
    state = torch.get_rng_state()
    first, second, other = (generate_planned(model, PROMPTS, replace(SETTINGS, seed=s)) for s in (11, 11, 12))
    assert first == second and torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, other, strict=True):
        assert a.codes != b.codes and a.tokens != b.tokens


def test_codes_and_tokens_have_seeds_of_their_own(model: FreeTransformer) -> None:
    def run(tokens: int, codes: int) -> list[PlannedRow]:
        return generate_planned(model, PROMPTS, replace(SETTINGS, seed=tokens), PlanSettings(seed=codes))

    assert [row.codes for row in run(1, 50)] == [row.codes for row in run(2, 50)]
    assert [row.tokens for row in run(1, 50)] != [row.tokens for row in run(2, 50)]
    assert [row.codes for row in run(1, 50)] != [row.codes for row in run(1, 51)]
    with torch.no_grad():  # the tokens' draws do not move with the codes': without a table nothing does
        for parameter in model.post_sampler.parameters():
            parameter.zero_()
    assert [row.tokens for row in run(1, 50)] == [row.tokens for row in run(1, 51)]


@torch.no_grad()
def test_the_encoder_reads_the_prompt_once_and_never_the_continuation(model: FreeTransformer) -> None:
    calls: list[Tensor] = []
    handle = model.encoder.register_forward_hook(lambda *call: calls.append(call[2]))
    generate_planned(model, PROMPTS, SETTINGS)
    assert [call.shape for call in calls] == [(3, 7, N_BITS)]
    generate_planned(model, PROMPTS, SETTINGS, PRIOR)
    assert len(calls) == 1
    handle.remove()
    for row, prompt in enumerate(PROMPTS):
        expected = model.posterior(model.lower(torch.tensor([prompt])))[0]
        torch.testing.assert_close(calls[0][row, -len(prompt) :], expected, rtol=1e-5, atol=1e-5)


def sampled_codes(model: FreeTransformer, prompt: list[int], plan: PlanSettings, times: int = 600) -> Tensor:
    """Codes ``times x (prompt + 2)`` of as many rows."""
    settings = SamplingSettings(max_new_tokens=2, seed=5)
    return torch.tensor([row.codes for row in generate_planned(model, [prompt] * times, settings, plan)])


@torch.no_grad()
def test_the_prompts_codes_follow_the_posterior() -> None:
    model, prompt = make_free(), PROMPTS[1]
    p = model.posterior(model.lower(torch.tensor([prompt])))[0].sigmoid().double()
    codes = sampled_codes(model, prompt, PlanSettings())
    found = ops.code_to_bits(codes[:, :-2], N_BITS).double().mean(0)
    assert ((found - p).abs() < 4.5 * (p * (1 - p) / len(codes)).sqrt() + 1e-3).all()


@pytest.mark.parametrize("plan", [PlanSettings(), PRIOR], ids=["posterior", "prior"])
def test_new_codes_are_uniform_and_those_of_a_prompt_planned_by_the_prior(plan: PlanSettings) -> None:
    model = make_free(n_latent_bits=4)
    codes = sampled_codes(model, PROMPTS[0], plan)
    drawn = codes if plan is PRIOR else codes[:, 3:]
    counts = torch.stack([place.bincount(minlength=16) for place in drawn.T]).double()
    expected = len(codes) / 16
    chi_squared = ((counts - expected) ** 2 / expected).sum(1)
    assert (chi_squared < 44).all()  # 15 degrees of freedom, p = 1e-4
    pairs = (16 * drawn[:, -2] + drawn[:, -1]).bincount(minlength=256).double()
    assert (
        (pairs - len(codes) / 256) ** 2 / (len(codes) / 256)
    ).sum() < 345  # 255 degrees: independent, p = 1e-4
    if plan is not PRIOR:
        posterior = codes[:, :3]
        counts = torch.stack([place.bincount(minlength=16) for place in posterior.T]).double()
        assert (((counts - expected) ** 2 / expected).sum(1) > 100).any()


def test_given_codes_are_kept_and_the_rest_drawn_as_without_them(model: FreeTransformer) -> None:
    given = ((7, -1, 0, -1, 30), (), (-1, 9))
    rows = generate_planned(model, PROMPTS, SETTINGS, PlanSettings(codes=given))
    free = generate_planned(model, PROMPTS, SETTINGS)
    for codes, row, other in zip(given, rows, free, strict=True):
        for place, code in enumerate(row.codes):
            wanted = codes[place] if place < len(codes) else -1
            assert code == (wanted if wanted != -1 else other.codes[place])
    assert rows[1] == free[1] and rows[0].tokens != free[0].tokens


def test_a_plan_used_again_gives_the_same_text(model: FreeTransformer) -> None:
    """Whoever planned it: the text depends on the codes and on the seed of the tokens alone."""
    rows = generate_planned(model, PROMPTS, SETTINGS)
    again = PlanSettings(prompt="prior", codes=tuple(tuple(row.codes) for row in rows), seed=999)
    assert generate_planned(model, PROMPTS, SETTINGS, again) == rows


def test_held_bits_are_held_in_all_codes_that_are_not_given(model: FreeTransformer) -> None:
    plan = PlanSettings(held_bits=((0, 1), (3, 0)), codes=((8, 8), (), (-1, 8)))
    for settings in (plan, replace(plan, prompt="prior")):
        for row, codes in zip(
            generate_planned(model, PROMPTS, SETTINGS, settings), plan.codes or (), strict=True
        ):
            for place, code in enumerate(row.codes):
                is_given = place < len(codes) and codes[place] != -1
                assert code == 8 if is_given else (code & 1 == 1 and code & 8 == 0)
            assert len({code & 0b10110 for code in row.codes}) > 2, "the other bits are free"


def test_a_held_bit_leaves_the_others_as_they_were_drawn(model: FreeTransformer) -> None:
    free, held = (
        generate_planned(model, PROMPTS, SETTINGS, PlanSettings(held_bits=h)) for h in ((), ((1, 1),))
    )
    for a, b in zip(free, held, strict=True):
        assert [code | 2 for code in a.codes] == b.codes


def test_a_prompt_of_one_token(model: FreeTransformer) -> None:
    for plan in (PlanSettings(), PRIOR, PlanSettings(codes=((4,),))):
        (row,) = generate_planned(model, [[5]], SETTINGS, plan)
        assert len(row.tokens) == 10 and len(row.codes) == 11
    assert row.codes[0] == 4


def test_a_stop_ends_tokens_and_codes_alike(model: FreeTransformer) -> None:
    free = generate_planned(model, PROMPTS, SETTINGS)
    stop = free[0].tokens[4]
    stopped = generate_planned(model, PROMPTS, replace(SETTINGS, stop_tokens=(stop,)))
    for prompt, before, after in zip(PROMPTS, free, stopped, strict=True):
        length = before.tokens.index(stop) if stop in before.tokens else 10
        assert after.tokens == before.tokens[:length] and after.codes == before.codes[: len(prompt) + length]


def test_more_new_tokens_continue_the_fewer(model: FreeTransformer) -> None:
    few = generate_planned(model, PROMPTS, replace(SETTINGS, max_new_tokens=4))
    for short, long in zip(few, generate_planned(model, PROMPTS, SETTINGS), strict=True):
        assert long.tokens[:4] == short.tokens and long.codes[: len(short.codes)] == short.codes


def test_the_callback_sees_every_token(model: FreeTransformer) -> None:
    seen: list[list[int]] = [[] for _ in PROMPTS]
    rows = generate_planned(model, PROMPTS, SETTINGS, callback=lambda row, token: seen[row].append(token))
    assert seen == [row.tokens for row in rows]


def test_sampling_leaves_modes_and_gradients_as_they_were(model: FreeTransformer) -> None:
    model.train()
    generate_planned(model, PROMPTS, SETTINGS)
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    text, code = torch.tensor([PROMPTS[1]]), torch.zeros(1, 7, dtype=torch.long)
    model(text, z=Plan(code)).logits.sum().backward()


def test_dropout_is_off_while_sampling() -> None:
    wet, dry = make_free(dropout=0.5).train(), make_free()
    assert generate_planned(wet, PROMPTS, SETTINGS) == generate_planned(dry, PROMPTS, SETTINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models_plan_with_exact_codes(dtype: torch.dtype) -> None:
    model = make_free(n_latent_bits=16).to(dtype)
    for row in generate_planned(model, PROMPTS, SETTINGS):
        assert all(0 <= code < 2**16 for code in row.codes) and len(set(row.codes)) == len(row.codes)
        assert all(0 <= token < 37 for token in row.tokens)


def test_sampling_under_autocast(model: FreeTransformer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate_planned(model, PROMPTS, SETTINGS, PRIOR)
    assert [row.codes for row in rows] == [
        row.codes for row in generate_planned(model, PROMPTS, SETTINGS, PRIOR)
    ]


SETTING_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"held_bits": ((-1, 0),)}, "held_bits must be an integer of at least 0, got -1"),
    ({"held_bits": ((1, 2),)}, "held_bits: the value of bit 1 must be 0 or 1, got 2"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
]


@pytest.mark.parametrize(("fields", "message"), SETTING_ERRORS, ids=str)
def test_bad_plan_settings_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanSettings(**fields)


CALL_ERRORS = [
    (PROMPTS, {"codes": ((32,),)}, r"codes\[0\] must be an integer in \[0, 32\), or -1: not given, got 32"),
    (
        PROMPTS,
        {"codes": ((), (3, -2))},
        r"codes\[1\] must be an integer in \[0, 32\), or -1: not given, got -2",
    ),
    (PROMPTS, {"codes": ((), (), (), ())}, "codes must be at most 3 rows, got 4"),
    (PROMPTS, {"held_bits": ((5, 1),)}, "held_bits must be below the model's 5 bits, got 5"),
    ([], {}, "prompts: wanted at least one"),
    ([[1], []], {}, r"prompts\[1\] is empty"),
    ([[1] * 55], {}, r"prompts\[0\]: 55 tokens and max_new_tokens=10 exceed max_seq_len=64"),
    ([[1] * 65], {}, r"prompts\[0\]: 65 tokens and max_new_tokens=10 exceed max_seq_len=64"),
    ([[1, 37]], {}, r"prompts\[0\]: id 37 is not in the vocabulary of 37 ids"),
]


@pytest.mark.parametrize(("prompts", "fields", "message"), CALL_ERRORS, ids=[case[2] for case in CALL_ERRORS])
def test_bad_calls_are_refused_by_name(
    prompts: list[list[int]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_planned(make_free(), prompts, SETTINGS, PlanSettings(**fields))


def test_the_whole_length_can_be_used(model: FreeTransformer) -> None:
    (row,) = generate_planned(model, [[1] * 54], SETTINGS)
    assert len(row.tokens) == 10 and len(row.codes) == 64
