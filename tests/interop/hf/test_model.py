import pytest
import torch
from transformers import DynamicCache

from decoder_cases import tokens_of
from helmholtz.interop.hf import HelmholtzForCausalLM, StateCache
from helmholtz.interop.hf.plans import prior_codes
from helmholtz.layers.latent import Plan
from hf_cases import CORES, ONE_OF_EACH, make


@torch.no_grad()
def core_logits(model, tokens, mask=None):
    """Of the model inside, under the plan that the config asks for."""
    core = model.model
    if core.plan is None:
        return core(tokens, attention_mask=mask).logits
    real = torch.ones_like(tokens) if mask is None else mask
    positions = (real.cumsum(1) - 1).clamp(min=0)
    seeds = torch.tensor([model.config.plan_seed])
    plan = Plan(prior_codes(seeds, positions, core.plan.n_bits))
    return core(tokens, z=plan, attention_mask=mask).logits


@pytest.mark.parametrize("name", CORES)
def test_logits_are_those_of_the_model_inside(name):
    model, tokens = make(name), tokens_of(2, 11)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, core_logits(model, tokens))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_pads_anywhere_change_nothing(name):
    model, tokens = make(name), tokens_of(1, 9)
    places = torch.tensor([1, 2, 4, 5, 6, 8, 9, 11, 12])
    padded, mask = torch.full((1, 14), 3), torch.zeros(1, 14, dtype=torch.long)
    padded[0, places], mask[0, places] = tokens[0], 1
    with torch.no_grad():
        alone, among = model(tokens).logits, model(padded, attention_mask=mask).logits
    torch.testing.assert_close(among[:, places], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CORES)
def test_a_stream_in_pieces_with_pads_is_the_whole(name):
    model, tokens = make(name), tokens_of(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 5] = 0
    cache = StateCache()
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        parts = [
            model(tokens[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in [(0, 4), (4, 5), (5, 10)]
        ]
    assert cache.get_seq_length() == 10
    assert torch.equal(cache.mask, mask.bool())
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-4, atol=2e-4)


def test_use_cache_starts_a_stream_and_a_kept_state_can_be_continued_twice():
    model, tokens = make("mamba"), tokens_of(1, 6)
    with torch.no_grad():
        output = model(tokens[:, :4], use_cache=True)
        state = output.past_key_values.state
        once = model(tokens[:, 4:], past_key_values=output.past_key_values).logits
        again = StateCache()
        again.advance(state, torch.ones(1, 4, dtype=torch.bool))
        assert torch.equal(model(tokens[:, 4:], past_key_values=again).logits, once)
    assert model(tokens, use_cache=False).past_key_values is None


def test_return_dict_false_gives_a_tuple():
    model, tokens = make("transformer"), tokens_of(2, 5)
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, model(tokens).logits) and isinstance(cache, StateCache)
    assert len(model(tokens, labels=tokens, use_cache=False, return_dict=False)) == 2
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "input_ids, inputs_embeds: wanted one of them, got both"),
        ({"input_ids": None}, "input_ids, inputs_embeds: wanted one of them, got neither"),
        ({"output_attentions": True}, "output_attentions: a helmholtz model takes no such argument"),
        ({"atention_mask": torch.ones(1, 3)}, "no such argument; did you mean 'attention_mask'"),
        ({"foo": 1}, "foo: a helmholtz model takes no such argument"),
        ({"is_causal": False}, "is_causal must be true: a decoder"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids must be of shape"),
        ({"seq_idx": torch.zeros(1, 4)}, "seq_idx must be of shape"),
        ({"label_smoothing": 0.1}, "label_smoothing must be None without labels"),
        ({"input_ids": torch.full((1, 3), 37)}, "id 37 is not in the vocabulary"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "longer than max_seq_len=64"),
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, "attention_mask: wanted shape"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be a helmholtz.interop.hf.StateCache"),
        ({"labels": torch.zeros(1, 4, dtype=torch.long)}, "labels must be of shape"),
        ({"labels": torch.full((1, 3), 37)}, "labels must be in"),
        ({"labels": torch.zeros(1, 3)}, "labels must be int32 or int64"),
        ({"plan_seed": 1}, "plan_seed must be None: a transformer has no plan"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(arguments, message):
    model = make("transformer")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.zeros(1, 3, dtype=torch.long)} | arguments)


def test_a_mask_that_contradicts_the_stream_is_refused():
    model, tokens = make("transformer"), tokens_of(1, 6)
    with torch.no_grad():
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask must be of shape \(1, 6\): the stream's"):
            model(tokens[:, 4:], attention_mask=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match="the same as before"):
            model(tokens[:, 4:], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), past_key_values=cache)


def test_a_code_is_a_function_of_seed_and_position_alone():
    positions = torch.tensor([[0, 1, 2, 3], [5, 1, 0, 3]])
    codes = prior_codes(torch.tensor([4]), positions, 16)
    assert torch.equal(codes[0, [0, 1, 3]], codes[1, [2, 1, 3]])
    mixed = prior_codes(torch.tensor([4, 5]), positions, 16)
    assert torch.equal(mixed[0], codes[0])
    assert not torch.equal(mixed[1], codes[1])
    many = prior_codes(torch.tensor([0]), torch.arange(20000)[None], 4)
    counts = many.flatten().bincount(minlength=16)
    assert (counts - 1250).abs().max() < 5 * 35  # five standard deviations


def test_plan_seeds_per_row_and_refusals():
    model, tokens = make("free"), tokens_of(1, 8).expand(3, -1)
    with torch.no_grad():
        rows = model(tokens, plan_seed=torch.tensor([0, 3, 0])).logits
        torch.testing.assert_close(rows[0], rows[2], rtol=0, atol=1e-5)
        torch.testing.assert_close(rows[:1], model(tokens[:1]).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(rows[1:2], model(tokens[:1], plan_seed=3).logits, rtol=0, atol=1e-5)
        assert (rows[0] - rows[1]).abs().max() > 1e-2
    for seed in (torch.tensor([1, 2]), torch.tensor([0.5, 1, 2]), -1):
        with pytest.raises(ValueError, match="plan_seed must be"):
            model(tokens, plan_seed=seed)


def test_a_wrapper_holds_the_model_itself():
    core = CORES["mamba"]().train()
    wrapper = HelmholtzForCausalLM.of(core)
    assert wrapper.model is core
    assert wrapper.training and core.training
    assert not any(parameter.is_meta for parameter in wrapper.parameters())
    with pytest.raises(ValueError, match="model must be one of the architectures"):
        HelmholtzForCausalLM.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("how", ["logits", "loss", "stream", "generate"])
def test_the_model_inside_is_called_so_that_its_hooks_run(name, how):
    model, calls = make(name), []
    model.model.register_forward_hook(lambda module, args, output: calls.append(output))
    tokens = tokens_of(2, 5)
    if how == "generate":
        model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    else:
        options = {"loss": {"labels": tokens}, "stream": {"use_cache": True}}.get(how, {})
        assert torch.equal(model(tokens, **options).logits, calls[0].logits)
    assert len(calls) == (2 if how == "generate" else 1)
