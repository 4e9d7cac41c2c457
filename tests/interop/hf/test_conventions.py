"""Whatever a Llama of transformers does, every architecture does: the same tests run on both."""

import copy
import json
import threading

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from decoder_cases import tokens_of
from helmholtz.data.tokenizer import ByteTokenizer, IdTokenizer
from helmholtz.interop.hf import HelmholtzConfig, HelmholtzForCausalLM, to_transformers
from helmholtz.models import MODELS
from hf_cases import of_architecture

every_model = pytest.mark.parametrize("name", [*MODELS, "llama"])
every_architecture = pytest.mark.parametrize("name", MODELS)
NEAR = {"rtol": 2e-4, "atol": 2e-4}


def build(name, tied=True, vocabulary=37):
    if name != "llama":
        return of_architecture(name, tie_embeddings=tied, vocab_size=vocabulary)
    torch.manual_seed(1)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(
        **sizes, intermediate_size=88, num_attention_heads=4, initializer_range=0.5, tie_word_embeddings=tied
    )
    config.bos_token_id = config.eos_token_id = None
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def embedding(model):
    return model.get_input_embeddings().weight


def greedy(model, *args, **options):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(*args, **options)


@every_model
def test_hidden_states_are_what_the_blocks_read_and_the_head(name):
    model, tokens = build(name), tokens_of(2, 7)
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert {tuple(x.shape) for x in states} == {(2, 7, model.config.hidden_size)}
        torch.testing.assert_close(states[0], model.get_input_embeddings()(tokens))
        torch.testing.assert_close(model.get_output_embeddings()(states[-1]), output.logits)
        assert model(tokens).hidden_states is None
        model.config.output_hidden_states = True
        assert torch.equal(model(tokens).hidden_states[1], states[1])
        labelled = model(tokens, labels=tokens).hidden_states
        torch.testing.assert_close(labelled[0], states[0])


@every_model
def test_hidden_states_have_gradients_and_leave_no_hooks(name):
    model, tokens = build(name), tokens_of(2, 5)
    model(tokens, output_hidden_states=True).hidden_states[-1].sum().backward()
    assert embedding(model).grad.abs().max() > 0
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert name == "llama" or not hooks


@every_model
def test_hidden_states_of_a_stream(name):
    model, tokens = build(name), tokens_of(1, 5)
    output = greedy(model, tokens, output_hidden_states=True, return_dict_in_generate=True)
    assert [len(states) for states in output.hidden_states] == [model.config.num_hidden_layers + 1] * 4
    assert [states[-1].shape[1] for states in output.hidden_states] == [5, 1, 1, 1]
    with torch.no_grad():
        whole = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, wanted in enumerate(whole):
        found = torch.cat([states[layer] for states in output.hidden_states], dim=1)
        torch.testing.assert_close(found, wanted, **NEAR)


@every_model
def test_vectors_may_come_instead_of_tokens(name):
    model, tokens = build(name), tokens_of(2, 7)
    vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
    wanted = model(tokens, labels=tokens)
    if name == "free_transformer":  # whose plan is drawn where labels are
        wanted = model(tokens)
        output = model(inputs_embeds=vectors)
        output.logits.square().sum().backward()
    else:
        output = model(inputs_embeds=vectors, labels=tokens)
        torch.testing.assert_close(output.loss, wanted.loss)
        output.loss.backward()
    torch.testing.assert_close(output.logits, wanted.logits)
    assert vectors.grad.abs().max() > 0
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    by_tokens = greedy(model, tokens, attention_mask=mask)
    by_vectors = greedy(model, inputs_embeds=vectors.detach(), attention_mask=mask)
    assert torch.equal(by_vectors, by_tokens[:, 7:])


@every_model
@pytest.mark.parametrize(
    ("kept", "places"),
    [
        (1, [6]),
        (3, [4, 5, 6]),
        (torch.tensor([0, 5]), [0, 5]),
        (torch.tensor([[1, 2], [3, 6]]), None),
        (torch.arange(14).view(2, 7) % 3 == 0, None),
    ],
    ids=["last", "last-3", "places", "places-by-row", "mask"],
)
def test_logits_of_chosen_positions(name, kept, places):
    model, tokens = build(name), tokens_of(2, 7)
    with torch.no_grad():
        whole = model(tokens).logits
        found = model(tokens, logits_to_keep=kept).logits
    if places is not None:
        wanted = whole[:, places]
    else:
        wanted = (
            whole[kept] if kept.dtype == torch.bool else torch.stack([whole[0, [1, 2]], whole[1, [3, 6]]])
        )
    torch.testing.assert_close(found, wanted)


@every_architecture
def test_a_loss_with_few_logits_is_of_all(name):
    model, tokens = build(name), tokens_of(2, 7)
    torch.manual_seed(0)
    whole = model(tokens, labels=tokens)
    torch.manual_seed(0)
    few = model(tokens, labels=tokens, logits_to_keep=1)
    torch.testing.assert_close(few.loss, whole.loss)
    torch.testing.assert_close(few.logits, whole.logits[:, -1:])


def packed(**options):
    rows = [
        {"input_ids": row}
        for row in (tokens_of(1, 5)[0], tokens_of(1, 3, seed=1)[0], tokens_of(1, 4, seed=2)[0])
    ]
    return rows, DataCollatorWithFlattening(return_tensors="pt", **options)(rows)


@pytest.mark.parametrize(
    ("name", "said_by"),
    [
        *((name, said_by) for name in MODELS for said_by in ("position_ids", "flash_attn_kwargs", "seq_idx")),
        ("llama", "position_ids"),  # the others need flash-attn
    ],
)
def test_flattened_rows_do_not_see_each_other(name, said_by):
    rows, batch = packed(**{"return_position_ids": False} | {f"return_{said_by}": True})
    model = build(name)
    with torch.no_grad():
        alone = torch.cat([model(row["input_ids"][None]).logits for row in rows], dim=1)
        labels = batch.pop("labels")
        torch.testing.assert_close(model(**batch, use_cache=False).logits, alone, **NEAR)
        hidden = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        assert {tuple(x.shape) for x in hidden} == {(1, 12, 32)}
    if name != "free_transformer":
        nats = nn.functional.cross_entropy(alone[0, :-1], labels[0, 1:])
        loss = model(**batch, labels=labels, use_cache=False).loss
        torch.testing.assert_close(loss, nats, **NEAR)
    model.train()(**batch, labels=labels, use_cache=False).loss.backward()
    assert embedding(model).grad.isfinite().all()


@every_model
def test_rows_of_a_batch_may_be_packed_differently(name):
    model, tokens = build(name), tokens_of(2, 6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    parts = [(0, 0, 6), (1, 0, 2), (1, 2, 6)]
    with torch.no_grad():
        found = model(tokens, position_ids=positions, use_cache=False)
        for row, start, end in parts:
            alone = model(tokens[row : row + 1, start:end]).logits
            torch.testing.assert_close(found.logits[row : row + 1, start:end], alone, **NEAR)
        few = model(tokens, position_ids=positions, use_cache=False, logits_to_keep=2).logits
        torch.testing.assert_close(few, found.logits[:, -2:], **NEAR)


@every_model
def test_positions_may_start_anywhere_and_be_said(name):
    model, tokens = build(name), tokens_of(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    own = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask).logits
        for positions in (own, own + 7):
            found = model(tokens, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(found[mask == 1], wanted[mask == 1], **NEAR)
        floats = model(tokens, attention_mask=mask.float()).logits
        torch.testing.assert_close(floats[mask == 1], wanted[mask == 1], **NEAR)


@every_model
def test_a_cache_that_nobody_asked_for_can_be_continued(name):
    model, tokens = build(name), tokens_of(2, 8)
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :5]).past_key_values
        assert cache.get_seq_length() == 5
        found = model(tokens[:, 5:], past_key_values=cache, use_cache=False).logits
        torch.testing.assert_close(found, whole[:, 5:], **NEAR)
        cache = model(inputs_embeds=model.get_input_embeddings()(tokens[:, :5])).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(tokens.flip(0)[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(found, whole.flip(0)[:, 5:], **NEAR)
        model.config.use_cache = False
        assert model(tokens).past_key_values is None


@pytest.mark.parametrize("name", [name for name in [*MODELS, "llama"] if name != "free_transformer"])
def test_labels_of_a_stream(name):
    model, tokens = build(name), tokens_of(2, 8)
    with torch.no_grad():
        first = model(tokens[:, :5], labels=tokens[:, :5], use_cache=True)
        rest = model(tokens[:, 5:], labels=tokens[:, 5:], past_key_values=first.past_key_values)
        logits = model(tokens).logits[:, 5:-1]
        wanted = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 6:].flatten())
        torch.testing.assert_close(rest.loss, wanted, **NEAR)
        assert rest.past_key_values.get_seq_length() == 8


def test_labels_of_a_stream_with_plans():
    model, tokens = build("free_transformer"), tokens_of(2, 8)
    with torch.no_grad():
        cache = model(tokens[:, :5], use_cache=True).past_key_values
        assert model(tokens[:, 5:], labels=tokens[:, 5:], past_key_values=cache).loss.isfinite()
        assert cache.get_seq_length() == 8 and cache.state.plan.code.shape == (2, 8)


@every_model
def test_shifted_labels_are_taken_as_they_are(name):
    model, tokens = build(name), tokens_of(2, 6)
    losses = []
    for labels in (
        {"labels": tokens},
        {"labels": tokens, "shift_labels": nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)},
    ):
        torch.manual_seed(0)
        losses.append(model(tokens, **labels).loss)
    torch.testing.assert_close(*losses)


@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_shrinks_and_stays(name, tied, tmp_path):
    model, tokens = build(name, tied), tokens_of(2, 6, vocabulary=30)
    with torch.no_grad():
        before = model(tokens).logits
        assert model.resize_token_embeddings(37) is model.get_input_embeddings()
        assert torch.equal(model(tokens).logits, before)
        for size, options in [
            (41, {}),
            (48, {"mean_resizing": False}),
            (64, {"pad_to_multiple_of": 64}),
            (30, {}),
        ]:
            model.resize_token_embeddings(size, **options)
            assert model.config.vocab_size == size == len(embedding(model))
            logits, kept = model(tokens).logits, min(size, 37)
            assert logits.shape[-1] == size
            torch.testing.assert_close(logits[..., :kept], before[..., :kept])
            assert (model.get_output_embeddings().weight is embedding(model)) == tied
            high = torch.full((1, 3), size - 1)
            assert model(high, labels=high).loss.isfinite()
            assert greedy(model, high).shape == (1, 7)
            if name != "llama":
                assert model.model.config == model.config.core_config()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert embedding(model).grad.abs().max() > 0


@every_architecture
def test_new_rows_are_small(name):
    """As those of a new model; torch's own are ten times as large."""
    for constant, expected in ((None, (3 * 32) ** -0.5), (0.02, 0.02)):
        model = build(name)
        model.config.initializer_range = constant
        model.resize_token_embeddings(200, mean_resizing=False)
        assert embedding(model)[37:].std().item() == pytest.approx(expected, rel=0.05)


@every_architecture
@pytest.mark.parametrize("constant", [None, 0.02])
def test_from_config_draws_what_the_library_draws_once(name, constant):
    config = HelmholtzConfig.of(name, build(name).model.config)
    config.initializer_range = constant
    assert config.core_config().initializer_range == config.initializer_range == constant
    assert (
        "initializer_range" not in config.to_diff_dict() and config.to_dict()["initializer_range"] == constant
    )
    torch.manual_seed(5)
    made = HelmholtzForCausalLM._from_config(config)  # what AutoModelForCausalLM.from_config calls
    after = torch.rand(3)
    torch.manual_seed(5)
    core = MODELS[name](config.core_config())
    assert torch.equal(after, torch.rand(3)), "nothing is drawn twice"
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), core.parameters(), strict=True))
    assert HelmholtzConfig(**json.loads(json.dumps(config.to_diff_dict()))).core == config.core


@every_model
def test_embeddings_and_heads_can_be_replaced(name):
    model, tokens = build(name, tied=False), tokens_of(2, 6)
    new, head = nn.Embedding(41, 32), nn.Linear(32, 41)
    with torch.no_grad():
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert model(torch.full((1, 3), 40)).logits.shape == (1, 3, 37)
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is head
        output = model(tokens, output_hidden_states=True)
        torch.testing.assert_close(output.logits, head(output.hidden_states[-1]))
        torch.testing.assert_close(output.hidden_states[0], new(tokens))
        if name != "llama":  # whose loss believes the config
            assert model(tokens, labels=torch.full_like(tokens, 40)).loss.isfinite()


@every_model
def test_embeddings_are_tied_and_untied_by_loading(name, tmp_path):
    model, tokens = build(name), tokens_of(2, 6)
    model.save_pretrained(tmp_path / "tied")
    kind = type(model)
    with torch.no_grad():
        if name != "llama":  # which draws a random head
            untied = kind.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
            assert untied.get_output_embeddings().weight is not embedding(untied)
            assert torch.equal(untied(tokens).logits, model(tokens).logits)
            assert not untied.config.tie_word_embeddings and not untied.model.config.tie_embeddings
            untied.get_output_embeddings().weight.mul_(2)
            untied.save_pretrained(tmp_path / "untied")
        else:
            build(name, tied=False).save_pretrained(tmp_path / "untied")
        plain = kind.from_pretrained(tmp_path / "untied")
        asked = kind.from_pretrained(
            tmp_path / "untied", tie_word_embeddings=True
        )  # which the weights contradict
        assert torch.equal(asked(tokens).logits, plain(tokens).logits)
        assert not torch.equal(plain(tokens).logits, model(tokens).logits)
        if name != "llama":
            assert not asked.config.tie_word_embeddings


@every_model
def test_an_implementation_of_attention_can_be_named(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        model = type(build(name)).from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
    model.set_attn_implementation("sdpa")
    assert model(tokens_of(1, 3)).logits.isfinite().all()


@every_model
def test_generation_stops_at_strings(name):
    model, tokenizer = build(name, vocabulary=257), to_transformers(ByteTokenizer(), max_seq_len=64)
    prompt = tokenizer("the king", return_tensors="pt")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    options = {"max_new_tokens": 8, "suppress_tokens": [*range(128, 257)], "tokenizer": tokenizer}
    plain = greedy(model, **prompt, **options)
    word = tokenizer.decode(plain[0, 10:12])
    stopped = greedy(model, **prompt, **options, stop_strings=[word])
    assert torch.equal(stopped, plain[:, : stopped.shape[1]])
    assert tokenizer.decode(stopped[0]).endswith(word) and stopped.shape[1] <= 12


@every_model
def test_a_pipeline_continues_a_batch(name):
    model, tokenizer = build(name, vocabulary=257), to_transformers(ByteTokenizer(), max_seq_len=64)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    rows = generate(
        ["the king", "of"],
        max_new_tokens=3,
        max_length=None,
        do_sample=False,
        batch_size=2,
        return_tensors=True,
    )
    for text, (row,) in zip(["the king", "of"], rows, strict=True):
        alone = greedy(model, **tokenizer(text, return_tensors="pt"), max_new_tokens=3)[0]
        assert row["generated_token_ids"][-3:] == alone[-3:].tolist()


@every_architecture
def test_a_pad_outside_of_the_vocabulary_is_a_pad(name):
    """Where tokens are no text, the pad of the exported tokenizer is an id more than the model has."""
    model, tokenizer = build(name), to_transformers(IdTokenizer(36), max_seq_len=64)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    batch = tokenizer(["1 2 3 4", "5 6"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(model(batch["input_ids"]).logits, wanted)
        torch.testing.assert_close(wanted[1, 2:], model(torch.tensor([[5, 6]])).logits[0], **NEAR)
        # rows that have ended are filled with pads
        model.generation_config.eos_token_id = int(
            model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1]
        )
        together = model.generate(**batch, max_new_tokens=4, do_sample=False)
        alone = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)[0, 2:]
        assert torch.equal(together[1, 4:][: len(alone)], alone)


@every_model
def test_models_are_copied_counted_and_moved(name):
    model, tokens = build(name), tokens_of(1, 5)
    again = copy.deepcopy(model)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (again.get_output_embeddings().weight is embedding(again)) == model.config.tie_word_embeddings
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedding(model).numel()
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    half = again.bfloat16()
    assert half.dtype == torch.bfloat16 and half(tokens).logits.dtype == torch.bfloat16
    torch.testing.assert_close(half(tokens).logits.float(), model(tokens).logits, rtol=0.2, atol=0.2)


@every_model
def test_models_are_loaded_in_parts_and_types(name, tmp_path):
    model, tokens = build(name), tokens_of(1, 5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = type(model).from_pretrained(tmp_path, device_map="cpu", dtype=torch.float64)
    assert again.dtype == torch.float64 and not again.training
    torch.testing.assert_close(again(tokens).logits.float(), model(tokens).logits, **NEAR)


@every_architecture
def test_threads_that_share_a_model_read_their_own(name):
    """What goes in as vectors and what is left out is of one call, not of the model."""
    model, tokens = build(name), tokens_of(4, 6)
    entered, found = threading.Barrier(4, timeout=60), {}

    def wait():
        entered.wait()

    together = model.get_input_embeddings().register_forward_hook(lambda *_: wait())

    def read(row):
        with torch.no_grad():
            vectors = torch.nn.functional.embedding(tokens[row : row + 1], embedding(model))
            given = {"inputs_embeds": vectors} if row % 2 else {"input_ids": tokens[row : row + 1]}
            found[row] = model(**given, logits_to_keep=row, output_hidden_states=row > 1, use_cache=False)

    threads = [threading.Thread(target=read, args=(row,)) for row in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    together.remove()
    with torch.no_grad():
        for row in range(4):
            wanted = model(tokens[row : row + 1], logits_to_keep=row).logits
            torch.testing.assert_close(found[row].logits, wanted)
            assert (found[row].hidden_states is None) == (row < 2)


@every_architecture
def test_what_others_pass_along_says_nothing(name):
    model, tokens = build(name), tokens_of(2, 5)
    passed = {
        "token_type_ids": torch.zeros_like(tokens),
        "cache_position": torch.arange(5),
        "max_length_q": 5,
    }
    with torch.no_grad():
        assert torch.equal(model(tokens, **passed).logits, model(tokens).logits)


@every_architecture
def test_sizes_are_in_the_dictionary_and_not_in_the_file(name, tmp_path):
    config = build(name).config
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 37}
    assert config.to_dict().items() >= sizes.items()
    assert type(config).from_dict(config.to_dict()).core == config.core
    config.save_pretrained(tmp_path)
    assert not sizes.keys() & json.loads((tmp_path / "config.json").read_text()).keys()


@every_model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft asks for
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # which generate gives to every model
def test_prompts_can_be_tuned(name):
    model, tokens = build(name), tokens_of(2, 5)
    # the other sizes come from the config
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tuned(**batch, labels=tokens).loss.backward()
    (prompt,) = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert prompt.shape == (3, 32) and prompt.grad.abs().max() > 0
    with torch.no_grad():
        vectors = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(tokens)], dim=1)
        wanted = greedy(model, inputs_embeds=vectors)
    assert torch.equal(greedy(tuned.eval(), **batch)[:, 5:], wanted)
