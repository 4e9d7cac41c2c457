"""Streams of a Free Transformer: codes that stay, an encoder that runs once, further turns."""

import copy
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from decoder_cases import N_BITS, codes_of, make_free, tokens_of
from helmholtz.layers.latent import Plan
from helmholtz.layers.state import map_state
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.outputs import LMState

BUILD: dict[str, Callable[[], FreeTransformer]] = {
    "every head its own": lambda: make_free(),
    "grouped": lambda: make_free(n_kv_heads=1, tie_embeddings=False),
    "bits": lambda: make_free(post_sampler="bits", n_layers=5, split_layer=4),
}
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()


@pytest.fixture(params=BUILD)
def model(request: pytest.FixtureRequest) -> FreeTransformer:
    return BUILD[request.param]()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def prefill(model: FreeTransformer, tokens: Tensor, code: Tensor, mask: Tensor | None = None) -> LMState:
    half = model.lower(tokens, model.init_state(len(tokens)), attention_mask=mask)
    state = model.upper(half, Plan(code)).state
    assert isinstance(state, LMState)
    return state


@pytest.mark.parametrize("mask", [None, LEFT], ids=["all real", "padded"])
@torch.no_grad()
def test_a_prompt_read_in_stages_and_a_text_written_token_by_token(
    model: FreeTransformer, mask: Tensor | None
) -> None:
    """The encoder runs over the prompt, once; then one code per token, none of which changes afterwards."""
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    tokens, drawn = tokens_of(2, 14), codes_of(2, 14)
    half = model.lower(tokens[:, :6], model.init_state(2), attention_mask=mask)
    plan = model.sample_posterior(half, generator=torch.Generator().manual_seed(2))
    output = model.upper(half, plan)
    parts, codes = [output.logits], torch.cat([plan.code, drawn[:, 6:]], 1)
    for t in range(6, 14):
        output = model.step(tokens[:, t : t + 1], output.state, z=Plan(codes[:, t : t + 1]))
        assert torch.equal(output.state.plan.code, codes[:, : t + 1])
        parts.append(output.logits)
    assert len(calls) == 1
    whole = None if mask is None else torch.cat([mask, torch.ones(2, 8, dtype=torch.bool)], 1)
    close(torch.cat(parts, 1), model(tokens, z=Plan(codes), attention_mask=whole).logits)


@torch.no_grad()
def test_a_step_without_a_plan_draws_one_code_per_token_and_keeps_it(model: FreeTransformer) -> None:
    tokens, state = tokens_of(2, 12), model.init_state(2)
    parts, seen = [], state.plan.code
    for t in range(12):
        output = model.step(tokens[:, t : t + 1], state)
        state = output.state
        assert torch.equal(state.plan.code[:, :t], seen) and state.plan.code.shape == (2, t + 1)
        seen = state.plan.code
        parts.append(output.logits)
    assert len(seen.unique()) > 8 and int(seen.min()) >= 0 and int(seen.max()) < 2**N_BITS
    close(torch.cat(parts, 1), model(tokens, z=Plan(seen)).logits)


@torch.no_grad()
def test_the_lower_half_in_chunks_and_the_encoder_over_all_of_them(model: FreeTransformer) -> None:
    """A prompt read in chunks is encoded when all is read: the last chunk's logits are those of the whole text."""
    tokens, code = tokens_of(2, 14), codes_of(2, 14)
    expected = model.posterior(model.lower(tokens))
    state = model.init_state(2)
    for here in (slice(0, 4), slice(4, 5), slice(5, 14)):
        half = model.lower(tokens[:, here], state)
        upto = model.posterior(model.lower(tokens[:, : here.stop]))
        close(model.posterior(half), upto[:, here])
        state = model.upper(half, Plan(code[:, here])).state
    close(model.posterior(half), expected[:, 5:])


@pytest.mark.parametrize("first", [None, LEFT], ids=["all real", "padded"])
@pytest.mark.parametrize("second", [None, LEFT.flip(0)], ids=["all real", "padded"])
@torch.no_grad()
def test_a_second_turn_is_encoded_in_the_context_of_the_first(
    model: FreeTransformer, first: Tensor | None, second: Tensor | None
) -> None:
    """Rows equal those alone: prompt, answer and second prompt in one text without pads."""
    tokens, code = tokens_of(2, 16), codes_of(2, 16)
    state = prefill(model, tokens[:, :6], code[:, :6], first)
    for t in range(6, 10):  # the answer, under given codes
        state = model.step(tokens[:, t : t + 1], state, z=Plan(code[:, t : t + 1])).state
    half = model.lower(tokens[:, 10:], state, attention_mask=second)
    bits = model.posterior(half)
    output = model.upper(half, Plan(code[:, 10:]))
    assert torch.equal(output.state.plan.code, code)
    all_real = torch.ones(2, 6, dtype=torch.bool)
    whole = torch.cat(
        [all_real if first is None else first, all_real[:, :4], all_real if second is None else second], 1
    )
    for row, real in enumerate(whole):
        alone, chosen = tokens[row : row + 1, real], code[row : row + 1, real]
        new = real[10:]
        close(bits[row, new], model.posterior(model.lower(alone))[0, -int(new.sum()) :])
        close(output.logits[row, new], model(alone, z=Plan(chosen)).logits[0, -int(new.sum()) :])
        assert not bits[row, ~new].any()
    assert output.state.position.tolist() == whole.sum(1).tolist()


@torch.no_grad()
def test_the_first_turn_matters_to_the_plan_of_the_second_but_keeps_its_own(model: FreeTransformer) -> None:
    tokens, others = tokens_of(1, 6), tokens_of(1, 6, seed=4)
    second = tokens_of(1, 5, seed=9)
    code = codes_of(1, 6)
    states = [prefill(model, x, code) for x in (tokens, others)]
    bits = [model.posterior(model.lower(second, state)) for state in states]
    assert (bits[0] - bits[1]).abs().amax(-1).min() > 1e-3
    other_codes = prefill(model, tokens, 31 - code)
    assert torch.equal(model.posterior(model.lower(second, other_codes)), bits[0]), (
        "the lower half knows no plan"
    )


@torch.no_grad()
def test_every_part_of_a_state_is_reordered_with_its_rows(model: FreeTransformer) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    state = prefill(model, tokens_of(3, 4), codes_of(3, 4), mask)
    rows = torch.tensor([2, 0])
    picked = map_state(lambda x: x[rows], state)
    assert torch.equal(picked.position, state.position[rows])
    for name in ("code", "hidden", "mask"):
        assert torch.equal(getattr(picked.plan, name), getattr(state.plan, name)[rows]), name
    assert {f.name for f in fields(state.plan)} == {"code", "hidden", "mask", "room"}
    new, code = tokens_of(3, 5, seed=2), codes_of(3, 5, seed=2)
    half, half_picked = model.lower(new, state), model.lower(new[rows], picked)
    close(model.posterior(half_picked), model.posterior(half)[rows])
    close(model.upper(half_picked, Plan(code[rows])).logits, model.upper(half, Plan(code)).logits[rows])


@torch.no_grad()
def test_vectors_for_the_encoder_are_kept_only_if_it_reads_again(model: FreeTransformer) -> None:
    """The first prompt needs none; a later one is refused by name, and nothing else differs."""
    tokens, code = tokens_of(2, 9), codes_of(2, 9)
    kept, light = (model.init_state(2, encode_again=again) for again in (True, False))
    halves = [model.lower(tokens[:, :6], state, attention_mask=LEFT) for state in (kept, light)]
    assert torch.equal(*map(model.posterior, halves))
    kept, light = (model.upper(half, Plan(code[:, :6])).state for half in halves)
    assert kept.plan.hidden.shape == (2, 6, 32) and light.plan.hidden is light.plan.mask is None
    rest = [model.step(tokens[:, 6:], state, z=Plan(code[:, 6:])) for state in (kept, light)]
    assert torch.equal(rest[0].logits, rest[1].logits) and torch.equal(rest[1].state.plan.code, code)
    with pytest.raises(ValueError, match=r"init_state\(\.\.\., encode_again=True\)"):
        model.posterior(model.lower(tokens[:, 6:], light))


@torch.no_grad()
def test_a_state_is_left_as_it_was_and_can_be_continued_twice(model: FreeTransformer) -> None:
    state = prefill(model, tokens_of(2, 6), codes_of(2, 6))
    kept = copy.deepcopy(state)
    tokens = tokens_of(2, 3, seed=1)
    first, second = (model.step(tokens, state, z=Plan(codes_of(2, 3, seed))) for seed in (1, 2))
    assert not torch.equal(first.logits, second.logits)
    assert torch.equal(state.position, kept.position)
    for name in ("code", "hidden"):
        assert torch.equal(getattr(state.plan, name), getattr(kept.plan, name))
    assert torch.equal(first.logits, model.step(tokens, kept, z=Plan(codes_of(2, 3, 1))).logits)


@torch.no_grad()
def test_a_stream_under_a_table_of_zeros_is_the_plain_decoders(model: FreeTransformer) -> None:
    """Codes then change nothing, and neither does drawing them."""
    for parameter in model.post_sampler.parameters():
        parameter.zero_()
    tokens, state = tokens_of(2, 12), model.init_state(2)
    first, second = (model.step(tokens, state) for _ in range(2))
    assert torch.equal(first.logits, second.logits) and not torch.equal(
        first.state.plan.code, second.state.plan.code
    )


def test_a_stream_ends_at_the_longest_sequence(model: FreeTransformer) -> None:
    state = prefill(model, tokens_of(1, 60), codes_of(1, 60))
    assert model.step(tokens_of(1, 4), state).state.position.tolist() == [64]
    for call in (model.step, model.lower):
        with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than max_seq_len=64"):
            call(tokens_of(1, 5), state)


def test_packed_documents_are_no_stream(model: FreeTransformer) -> None:
    with pytest.raises(
        ValueError, match="cu_seqlens must be None with a state: its rows are one sequence each"
    ):
        model.lower(tokens_of(1, 6), model.init_state(1), cu_seqlens=torch.tensor([0, 2, 6]))


@torch.no_grad()
def test_autocast_keeps_codes_and_streams_as_it_reads(model: FreeTransformer) -> None:
    tokens, code = tokens_of(2, 10), codes_of(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, z=Plan(code)).logits
        state = prefill(model, tokens[:, :6], code[:, :6])
        half = model.lower(tokens[:, 6:], state)
        plan = model.sample_posterior(half, generator=torch.Generator())
        assert plan.code.dtype == torch.long
        rest = model.upper(half, Plan(code[:, 6:])).logits
        bits = model.posterior(model.lower(tokens))[:, 6:]
        again = model.posterior(half)
    for found, wanted in ((rest, expected[:, 6:]), (again, bits)):
        assert (found - wanted).abs().max() < 16 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
