"""Models of transformers that read free energies: exact at the start, and right in every way they are called."""

import copy

import pytest
import torch

from foreign_models import BACKENDS, DECODERS, ENCODERS, VOCABULARY, inputs, liven, livened, make, real
from helmholtz.interop.hf.free_energy import remove_free_energy, use_free_energy
from helmholtz.reference import masked_free_energy

every_model = pytest.mark.parametrize("name", DECODERS + ENCODERS)
every_decoder = pytest.mark.parametrize("name", DECODERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_model
@every_backend
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_start_is_the_model_bit_for_bit(name, backend, training):
    """Dropout of the attention weights included: it falls on the same weights."""
    model = make(name, backend=backend, dropout=0.3).train(training)
    logits = []
    for _ in range(2):
        torch.manual_seed(5)
        logits.append(model(**inputs(name)).logits)
        if len(logits) == 1:
            use_free_energy(model)
    assert torch.equal(*logits)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_start_is_exact_in_other_dtypes(name, dtype):
    model, given = make(name).to(dtype), inputs(name)
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    before = model(**given).logits
    new = use_free_energy(model)
    assert torch.equal(model(**given).logits, before)
    assert {parameter.dtype for parameter in new} == {dtype}


@every_model
def test_both_implementations_agree_after_the_start_and_can_be_changed(name):
    model, given = livened(name), inputs(name)
    before = make(name)(**given).logits
    sdpa = model(**given).logits
    model.set_attn_implementation("eager")
    eager = model(**given, output_attentions=True)
    torch.testing.assert_close(real(name, given, eager.logits), real(name, given, sdpa), rtol=1e-4, atol=1e-5)
    assert (real(name, given, sdpa) - real(name, given, before)).abs().max() > 0.01
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in eager.attentions)


def gated(module, mean, x, q, k, v, seen, scale):
    """The read of one attention module from the formula, in float64."""
    gate = {name: p.double() for name, p in module.free_energy.named_parameters()}
    free = masked_free_energy(q, k, v, gate["log_beta"].exp(), mask=seen, scale=scale).transpose(1, 2)
    inner, outer = ((x @ gate[f"{n}.weight"].T).view(mean.shape) for n in ("inner", "outer"))
    lam = gate["alpha"] * inner.sigmoid()
    return (outer.exp() * ((1 - lam) * mean + lam * free)).flatten(2)


def heads_of(x, width):
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def llama_by_hand(module, x, seen):
    q, k, v = (heads_of(x @ p.weight.T, 4) for p in (module.q_proj, module.k_proj, module.v_proj))
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 2).masked_fill(~seen, -torch.inf)
    mean = (scores.softmax(-1) @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
    return gated(module, mean, x, q, k, v, seen, 1 / 2) @ module.o_proj.weight.T


def gpt2_by_hand(module, x, seen):
    q, k, v = (heads_of(y, 4) for y in (x @ module.c_attn.weight + module.c_attn.bias).chunk(3, dim=-1))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~seen, -torch.inf)  # the second layer's scale
    mean = (scores.softmax(-1) @ v).transpose(1, 2)
    return gated(module, mean, x, q, k, v, seen, 1 / 4) @ module.c_proj.weight + module.c_proj.bias


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@every_backend
def test_an_attention_module_and_all_its_gradients_are_those_of_the_formula(name, backend):
    by_layer = {"scale_attn_by_inverse_layer_idx": True} if name == "gpt2" else {}
    model = livened(name, backend=backend, **by_layer).double()
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    mask = None if backend == "sdpa" else torch.zeros(5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    if name == "llama":
        module, no_rotation = model.model.layers[1].self_attn, (torch.ones(1, 5, 4), torch.zeros(1, 5, 4))
        actual, expected = module(x, no_rotation, mask)[0], llama_by_hand(module, x, seen)
    else:
        module = model.transformer.h[1].attn
        actual, expected = module(x, attention_mask=mask)[0], gpt2_by_hand(module, x, seen)
    single = (
        {"rtol": 1e-5, "atol": 1e-5} if (name, backend) == ("llama", "eager") else {}
    )  # Llama's own softmax
    torch.testing.assert_close(actual, expected, **single)
    leaves, cotangent = [x, *module.parameters()], torch.randn_like(actual)
    both = (torch.autograd.grad((out * cotangent).sum(), leaves) for out in (actual, expected))
    for got, want in zip(*both, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, **single)


def test_without_a_mask_each_implementation_is_causal_where_its_own_mean_is():
    """Eager attention knows of causality from its mask alone."""
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for backend, seen in (("sdpa", torch.ones(5, 5).tril() > 0), ("eager", torch.ones(5, 5) > 0)):
        model = livened("gpt2", backend=backend, scale_attn_by_inverse_layer_idx=True).double()
        module = model.transformer.h[1].attn
        torch.testing.assert_close(module(x)[0], gpt2_by_hand(module, x, seen))


@every_decoder
def test_the_future_changes_no_bit_of_the_past(name):
    model, tokens = livened(name), inputs(name)["input_ids"]
    shaken = tokens.clone()
    shaken[:, 6:] = 3
    logits = [model(input_ids=x).logits for x in (tokens, shaken)]
    assert torch.equal(logits[0][:, :6], logits[1][:, :6])
    assert not torch.equal(logits[0][:, 6:], logits[1][:, 6:])


@every_backend
@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_pads_change_nothing_whatever_they_hold(name, backend):
    model, given = livened(name, backend=backend), inputs(name)
    spoilt = given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)
    logits = model(**given).logits, model(**given | {"input_ids": spoilt}).logits
    assert torch.equal(real(name, given, logits[0]), real(name, given, logits[1]))
    row = given["input_ids"][1:][given["attention_mask"][1:] == 1][None]
    positions = (
        {} if name == "bert" else {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    )
    padded = model(**given, **positions).logits[1][given["attention_mask"][1] == 1]
    torch.testing.assert_close(padded, model(input_ids=row).logits[0], rtol=1e-4, atol=1e-5)


def generate(model, tokens, **settings):
    return model.generate(tokens, max_new_tokens=12, do_sample=False, **settings)


@every_decoder
@every_backend
def test_generation_with_a_cache_is_generation_without(name, backend):
    model, tokens = livened(name, backend=backend), inputs(name)["input_ids"][:1]
    cached = generate(model, tokens, use_cache=True)
    assert torch.equal(cached, generate(model, tokens, use_cache=False))
    assert not torch.equal(cached, generate(make(name, backend=backend), tokens))
    assert len(cached[0, 9:].unique()) > 2


@every_decoder
def test_a_cached_step_gives_the_logits_of_the_whole(name):
    model, tokens = livened(name), inputs(name)["input_ids"][:1]
    whole, past, parts = model(tokens).logits, None, []
    for part in tokens.split([4, 1, 3, 1], dim=1):
        out = model(part, past_key_values=past, use_cache=True)
        past, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_generation_of_padded_rows_is_that_of_each_alone(name):
    model, given = livened(name), inputs(name)
    both = generate(model, **{"tokens": given["input_ids"], "attention_mask": given["attention_mask"]})
    for row, mask, got in zip(given["input_ids"], given["attention_mask"], both, strict=True):
        alone = generate(model, row[mask == 1][None], attention_mask=mask[mask == 1][None])
        assert torch.equal(alone[0, -12:], got[-12:])


def test_a_static_cache_gives_the_same_text():
    model, tokens = livened("llama"), inputs("llama")["input_ids"][:1]
    static = generate(model, tokens, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, tokens))


def test_beams_are_those_without_a_cache():
    model, tokens = livened("llama"), inputs("llama")["input_ids"][:1]
    cached = generate(model, tokens, num_beams=3, use_cache=True)
    assert torch.equal(cached, generate(model, tokens, num_beams=3, use_cache=False))


def loss_of(model, name):
    given = inputs(name)
    labels = torch.tensor([1, 3]) if name == "vit" else given["input_ids"]
    return model(**given, labels=labels).loss


@every_model
def test_the_first_step_reaches_alpha_and_the_outer_gate_and_the_second_all(name):
    model = make(name).train()
    new = use_free_energy(model, freeze=True)
    names = {id(p): n.split("free_energy.")[-1] for n, p in model.named_parameters()}
    assert [p for p in model.parameters() if p.requires_grad] == new
    loss_of(model, name).backward()
    reached = {names[id(p)] for p in new if p.grad.abs().max() > 0}
    assert reached == {"alpha", "outer.weight"}
    with torch.no_grad():
        for parameter in new:
            parameter.sub_(0.1 * parameter.grad.sign())
    loss_of(model, name).backward()
    assert all(p.grad.abs().max() > 0 for p in new)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_model
@pytest.mark.parametrize("gates", ["channel", "head"])
def test_training_the_new_parameters_alone_lowers_the_loss(name, gates):
    model = make(name).train()
    old = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(use_free_energy(model, gates=gates, freeze=True), lr=0.02)
    losses = []
    for _ in range(12):
        losses.append(loss_of(model, name))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in old.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_gradient_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        model = livened(name).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        loss_of(model, name).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@every_model
def test_removing_it_gives_the_model_back(name):
    model, given = make(name), inputs(name)
    config, state, before = model.config.to_dict(), model.state_dict(), model(**given).logits
    use_free_energy(model)
    liven(model)
    assert not torch.equal(model(**given).logits, before)
    remove_free_energy(model)
    assert torch.equal(model(**given).logits, before)
    assert list(model.state_dict()) == list(state) and model.config.to_dict() == config
    use_free_energy(model)
    assert torch.equal(model(**given).logits, before)


def test_a_copy_is_a_model_of_its_own():
    model, given = livened("llama"), inputs("llama")
    before, twin = model(**given).logits, copy.deepcopy(model)
    remove_free_energy(model)
    assert torch.equal(twin(**given).logits, before)
    remove_free_energy(twin)
    assert torch.equal(twin(**given).logits, model(**given).logits)


def test_autocast_computes_the_free_energy_in_float32():
    model, given = livened("llama"), inputs("llama")
    exact = real("llama", given, model(**given).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = real("llama", given, model(**given).logits)
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True goes past"),
        ({"add_cross_attention": True}, "cross-attention of GPT2Attention is not supported"),
    ],
)
def test_variants_of_a_supported_model_that_are_refused(changes, words):
    model = make("gpt2", **changes)
    with pytest.raises(ValueError, match=words):
        use_free_energy(model)
    assert not any("free_energy" in key for key in model.state_dict())


def test_models_that_are_refused_by_name():
    import transformers

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**tiny, head_dim=4, intermediate_size=8))
    with pytest.raises(
        ValueError, match="GemmaForCausalLM has attention of class GemmaAttention; supported are Bert"
    ):
        use_free_energy(gemma)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**{**tiny, "state_size": 2}))
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention module it knows"):
        use_free_energy(mamba)
    crossed = transformers.BertLMHeadModel(
        transformers.BertConfig(**tiny, intermediate_size=8, is_decoder=True, add_cross_attention=True)
    )
    with pytest.raises(ValueError, match="attention of class BertCrossAttention; supported"):
        use_free_energy(crossed)
    with pytest.raises(ValueError, match="model: wanted a transformers.PreTrainedModel, got Linear"):
        use_free_energy(torch.nn.Linear(2, 2))


def test_other_attention_functions_are_refused_before_and_after():
    model = make("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation must be one of \['eager', 'sdpa'\]"):
        use_free_energy(model)
    model.config._attn_implementation = "sdpa"
    use_free_energy(model)
    with pytest.raises(ValueError, match="model: this LlamaForCausalLM reads free energies already"):
        use_free_energy(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        model(**inputs("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM does not read free energies"):
        remove_free_energy(make("llama"))


def test_arguments_the_read_cannot_follow_are_refused():
    model = livened("llama")
    with pytest.raises(ValueError, match="softcap: LlamaAttention cannot read free energies with it"):
        model(**inputs("llama"), softcap=2.0)
