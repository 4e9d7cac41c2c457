import pytest
import torch
from transformers import GenerationConfig

from decoder_cases import tokens_of
from helmholtz.interop.hf import StateCache
from helmholtz.models.generation import SamplingSettings, generate
from hf_cases import ONE_OF_EACH, STREAMS, WITHOUT_PLAN, make

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", STREAMS)
def test_greedy_with_a_cache_is_greedy_without(name):
    model, tokens = make(name), tokens_of(2, 6)
    cached = model.generate(tokens, **GREEDY)
    assert cached.shape == (2, 6 + NEW)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **GREEDY))


@pytest.mark.parametrize("name", [name for name in STREAMS if name in WITHOUT_PLAN])
def test_greedy_is_that_of_this_library(name):
    model, tokens = make(name), tokens_of(2, 6)
    ours = generate(model.model, tokens.tolist(), SamplingSettings(max_new_tokens=NEW, temperature=0))
    assert model.generate(tokens, **GREEDY)[:, 6:].tolist() == ours


@pytest.mark.parametrize("name", STREAMS)
def test_left_padding_does_not_matter(name):
    model, tokens = make(name), tokens_of(2, 7)
    tokens[0, :3] = 0
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    batch = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(batch[0, 7:], model.generate(tokens[:1, 3:], **GREEDY)[0, 4:])
    assert torch.equal(batch[1, 7:], model.generate(tokens[1:], **GREEDY)[0, 7:])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_beams_with_a_cache_are_beams_without(name):
    model, tokens = make(name), tokens_of(2, 5)
    tokens[0, :2] = 0
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    options = GREEDY | {
        "num_beams": 3,
        "num_return_sequences": 2,
        "attention_mask": mask,
        "max_new_tokens": 5,
    }
    cached = model.generate(tokens, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert not torch.equal(cached[0], cached[1])


@pytest.mark.parametrize("name", ["fem-gla", "free"])
def test_sampling_is_the_same_with_and_without_a_cache(name):
    model, tokens = make(name), tokens_of(2, 5)
    options = {"max_new_tokens": NEW, "do_sample": True, "top_p": 0.9, "temperature": 1.3, "pad_token_id": 0}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(tokens, use_cache=use_cache, num_return_sequences=2, **options))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (4, 5 + NEW)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("name", ["transformer", "fem-softmax", "free"])
def test_a_generation_allocates_its_cache_once(name):
    model, tokens, places = make(name), tokens_of(2, 6), set()

    def note(module, args, kwargs, output):
        cache = output.past_key_values
        block = cache.state.blocks[0]
        places.add((getattr(block, "prior", block).k.data_ptr(), cache.mask.data_ptr()))
        assert model.model.plan is None or cache.state.plan.hidden is None

    model.register_forward_hook(note, with_kwargs=True)
    model.generate(tokens, **GREEDY)
    assert len(places) == 1


@pytest.mark.parametrize("name", ["mamba-hopfield", "transformer"])
def test_a_returned_cache_can_be_continued(name):
    model, tokens = make(name), tokens_of(1, 6)
    first = model.generate(tokens, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 4})
    assert isinstance(first.past_key_values, StateCache)
    assert first.past_key_values.get_seq_length() == 9  # the last token has not been read
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 4}
    )
    assert torch.equal(rest, model.generate(tokens, **GREEDY | {"max_new_tokens": 8}))


def test_a_chunked_prefill_is_a_prefill():
    model, tokens = make("fem-hybrid-untied"), tokens_of(2, 9)
    assert torch.equal(
        model.generate(tokens, prefill_chunk_size=4, **GREEDY), model.generate(tokens, **GREEDY)
    )


def test_a_seed_per_row_goes_with_its_row():
    model, tokens = make("free"), tokens_of(1, 6)
    seeds = torch.tensor([0, 22])  # whose plans make a difference here
    both = model.generate(tokens.expand(2, -1), plan_seed=seeds, **GREEDY)
    assert torch.equal(both[:1], model.generate(tokens, **GREEDY))
    assert torch.equal(both[1:], model.generate(tokens, plan_seed=22, **GREEDY))
    assert not torch.equal(both[0], both[1])
    options = GREEDY | {"num_beams": 2}
    beams = model.generate(tokens.expand(2, -1), plan_seed=seeds, **options)
    assert torch.equal(
        beams, model.generate(tokens.expand(2, -1), plan_seed=seeds, use_cache=False, **options)
    )


def test_the_encoder_plans_a_prompt_when_asked():
    model, tokens = make("free"), tokens_of(2, 7)
    tokens[0, :3] = 0
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    prior = model.generate(tokens, attention_mask=mask, **GREEDY)
    model.config.prompt_plan = "posterior"
    planned = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(planned, model.generate(tokens, attention_mask=mask, **GREEDY))
    assert not torch.equal(planned, prior)
    # the pads do not matter to the encoder either
    assert torch.equal(planned[0, 7:], model.generate(tokens[:1, 3:], **GREEDY)[0, 4:])
    with torch.no_grad():
        # the last token of the prompt, read by the encoder, changes the code of the first
        cache, other = StateCache(), StateCache()
        model(tokens[1:], past_key_values=cache)
        changed = tokens[1:].clone()
        changed[0, -1] = (changed[0, -1] + 1) % 37
        model(changed, past_key_values=other)
        same = (cache.state.plan.code == other.state.plan.code).float().mean()
        assert same < 1
        assert torch.equal(model(tokens).logits, model(tokens, plan_seed=0).logits)
    for options, name in [
        ({"use_cache": False}, "use_cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be .* prompt_plan='posterior'"):
            model.generate(tokens, **GREEDY, **options)


def test_what_needs_a_cropped_cache_is_refused():
    model, tokens = make("transformer"), tokens_of(1, 6)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make("transformer")}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(tokens, **GREEDY, **options)
    cache = model(tokens, use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="holds states of helmholtz"):
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)


def test_other_caches_and_unknown_arguments_are_refused():
    model, tokens = make("transformer"), tokens_of(1, 6)
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(tokens, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="use_cache must be false where sequences are packed"):
        model.generate(tokens, position_ids=torch.arange(6).flip(0)[None], **GREEDY)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(tokens, output_attentions=True, return_dict_in_generate=True, **GREEDY)


@pytest.mark.parametrize("name", ["fem-hybrid-untied", "mamba-hopfield", "free"])
def test_a_cache_selects_repeats_and_forgets_rows(name):
    model, tokens = make(name), tokens_of(3, 5)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        rows = tokens[[2, 2, 0, 0]]
        step = model(rows[:, :1], past_key_values=cache).logits
        whole = model(torch.cat([rows, rows[:, :1]], 1)).logits
        torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=2e-4, atol=2e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(
            model(tokens, past_key_values=cache).logits, model(tokens).logits, rtol=2e-4, atol=2e-4
        )


def test_a_generation_starts_at_the_begin_token():
    model = make("transformer")
    model.generation_config = GenerationConfig(bos_token_id=36, eos_token_id=36, pad_token_id=36)
    started = model.generate(max_new_tokens=3, do_sample=False)
    assert started[0, 0] == 36
