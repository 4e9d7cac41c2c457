"""The original spelling of the Free Transformer: its README runs, and what was wrong with it is right."""

import importlib
import inspect
import math
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

from helmholtz.interop.seeds import free_transformer as seed
from helmholtz.interop.seeds.free_transformer import (
    config,
    losses,
    model,
    synthetic_data,
    train_utils,
)
from helmholtz.layers.latent import Plan
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.ops.binary_latent import code_lookup

ROOT = Path(__file__).resolve().parents[2]
SUBMODULES = (
    "model", "baseline", "encoder", "latent", "injection", "losses", "synthetic_data", "train_utils", "config",
)  # fmt: skip


def sizes(**changes) -> config.ModelConfig:
    small = dict(vocab_size=50, hidden_dim=32, num_layers=4, num_heads=4, latent_dim=5, max_seq_len=40)
    return config.ModelConfig(**small | changes)


def free(**changes) -> seed.FreeTransformer:
    torch.manual_seed(1)
    made = seed.FreeTransformer(sizes(**changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.skipif("FREE_TRANSFORMER_README" not in os.environ, reason="names no README of the original")
def test_the_readme_of_the_original_runs_verbatim(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "compat")
    page = Path(os.environ["FREE_TRANSFORMER_README"]).read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        names = {"torch": torch}  # which the snippet does not import
        exec(compile(block, "README", "exec"), names)
        assert names["logits"].shape == (2, 128, 1000)
        assert names["z_logits"].shape == (2, 128, 8)
        assert names["generated"].shape == (2, 30)
        assert torch.equal(names["generated"][:, :10], names["tokens"][:, :10])


def test_the_imports_of_the_original_are_this_facade(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "compat")
    old = importlib.import_module("free_transformer")
    assert set(old.__all__) == set(seed.__all__) and len(old.__all__) == 9
    assert all(getattr(old, name) is getattr(seed, name) for name in seed.__all__)
    for name in SUBMODULES:
        shim = importlib.import_module(f"free_transformer.{name}")
        place = "model" if name in ("baseline", "encoder", "latent", "injection") else name
        real = importlib.import_module(f"{seed.__name__}.{place}")
        assert shim.__all__ and all(getattr(shim, n) is getattr(real, n) for n in shim.__all__)


def test_defaults_are_those_of_the_original_but_for_the_documented_ones():
    made = config.ModelConfig()
    assert (made.vocab_size, made.hidden_dim, made.num_layers, made.num_heads) == (32000, 4096, 32, 32)
    assert (made.max_seq_len, made.latent_dim, made.num_kv_heads, made.split_layer) == (2048, 16, None, None)
    training = config.TrainingConfig()
    assert (training.learning_rate, training.kappa_free_bits, training.max_steps) == (3e-4, 0.3466, 100000)
    assert [f.name for f in fields(config.ModelConfig)][:4] == [
        "vocab_size",
        "hidden_dim",
        "num_layers",
        "num_heads",
    ]
    assert len(fields(config.TrainingConfig)) == 20
    assert list(inspect.signature(seed.FreeTransformer.generate).parameters) == [
        "self", "prompt_tokens", "max_new_tokens", "temperature", "top_k",
    ]  # fmt: skip


def test_the_feed_forward_follows_the_width():
    assert config.ModelConfig(hidden_dim=128, num_heads=4).to_core().d_ff == 344
    assert sizes(ffn_hidden_dim=40).to_core().d_ff == 40


def test_every_size_reaches_the_model():
    core = sizes(num_kv_heads=2, split_layer=1, dropout=0.1).to_core()
    assert (core.n_kv_heads, core.split_layer, core.dropout, core.n_latent_bits) == (2, 1, 0.1, 5)
    plain = sizes(num_kv_heads=2, dropout=0.1).to_baseline()
    assert (plain.vocab_size, plain.d_model, plain.n_layers, plain.n_heads, plain.max_seq_len) == (
        50,
        32,
        4,
        4,
        40,
    )
    assert (plain.n_kv_heads, plain.dropout) == (2, 0.1)


@pytest.mark.parametrize("build", [seed.FreeTransformer, seed.TransformerBaseline])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_rmsnorm=False), "use_rmsnorm must be True"),
        (dict(use_swiglu=False), "use_swiglu must be True"),
        (dict(use_rope=False), "use_rope must be True"),
        (dict(attention_dropout=0.1), "attention_dropout must be 0"),
        (dict(num_heads=5), "n_heads must divide d_model"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(sizes(**changes))


@pytest.mark.parametrize("bits", [0, 17])
def test_a_plan_has_1_to_16_bits(bits):
    with pytest.raises(ValueError, match="n_latent_bits must be"):
        seed.FreeTransformer(sizes(latent_dim=bits))


def test_modes_differ_in_who_draws_the_plan():
    made, tokens = free().eval(), torch.randint(50, (2, 12))
    logits, z_logits = made(tokens)
    assert logits.shape == (2, 12, 50) and z_logits.shape == (2, 12, 5)
    assert z_logits.std(dim=1).min() > 0  # the original: the same at every position
    logits, nothing = made(tokens, mode="inference")
    assert logits.shape == (2, 12, 50) and nothing is None
    with pytest.raises(ValueError, match="mode must be one of .*did you mean 'inference'"):
        made(tokens, mode="inferense")


def test_evaluation_draws_the_plan_as_training_does():
    made, tokens = free().eval(), torch.randint(50, (1, 30))
    one, other = made(tokens)[0], made(tokens)[0]
    assert not torch.equal(one, other)


def test_training_reaches_every_parameter():
    made, tokens = free(), torch.randint(50, (2, 13))
    logits, z_logits = made(tokens[:, :-1])
    loss, _ = seed.compute_vae_loss(logits, tokens[:, 1:], z_logits, latent_dim=5, free_bits=0.0)
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_generation_keeps_the_prompt_is_seeded_and_greedy_at_zero():
    made, prompt = free(), torch.randint(50, (2, 5))
    torch.manual_seed(4)
    first = made.generate(prompt, max_new_tokens=7, top_k=10)
    torch.manual_seed(4)
    assert torch.equal(made.generate(prompt, max_new_tokens=7, top_k=10), first)
    assert first.shape == (2, 12) and torch.equal(first[:, :5], prompt)
    assert made.training
    assert made.generate(prompt, max_new_tokens=3, temperature=0.0).shape == (2, 8)
    with pytest.raises(ValueError, match="exceed max_seq_len=40"):
        made.generate(prompt, max_new_tokens=36)
    with pytest.raises(ValueError, match="temperature"):
        made.generate(prompt, temperature=-1.0)


def test_baseline_is_causal_and_smaller():
    made, tokens = seed.TransformerBaseline(sizes()).eval(), torch.randint(50, (1, 10))
    logits = made(tokens)
    assert logits.shape == (1, 10, 50)
    torch.testing.assert_close(made(tokens[:, :6]), logits[:, :6], rtol=1e-5, atol=1e-6)
    assert train_utils.count_parameters(made) < train_utils.count_parameters(free())


def test_parts_of_the_model():
    x, source = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    block = model.TransformerBlock(32, 4, 2, 48)
    y = block(x, kv_input=source)
    torch.testing.assert_close(block(x[:, :4], kv_input=source[:, :4]), y[:, :4], rtol=1e-5, atol=1e-6)
    later = source.clone()
    later[:, 5] += 1
    assert torch.equal(block(x, kv_input=later)[:, :5], y[:, :5])
    assert not torch.equal(block(x, kv_input=later)[:, 5:], y[:, 5:])
    torch.testing.assert_close(block(x, kv_input=3 * source), y, rtol=1e-3, atol=1e-3)  # normalised
    two_sided = model.TransformerBlock(32, 4, 4, 48, causal=False)
    assert not torch.equal(two_sided(x, kv_input=later)[:, :5], two_sided(x, kv_input=source)[:, :5])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 7:] = False
    torch.testing.assert_close(two_sided(x, mask=mask)[:, :7], two_sided(x[:, :7]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="attention_mask"):
        block(x, mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="x must be at most max_seq_len = 4"):
        model.TransformerBlock(32, 4, 4, 48, max_seq_len=4)(x)
    with pytest.raises(ValueError, match="use_rope must be True"):
        model.TransformerBlock(32, 4, 4, 48, use_rope=False)
    assert model.SwiGLU(32, 48)(x).shape == x.shape
    torch.testing.assert_close(model.RMSNorm(32)(x).square().mean(-1), torch.ones(2, 9), rtol=1e-4, atol=1e-4)


def test_rotary_positions_are_relative():
    rotary = model.RotaryEmbedding(8, max_seq_len=16)
    q, k = (torch.randn(1, 1, 2, 8).expand(1, 16, 2, 8) for _ in range(2))
    q, k = rotary(q, k)
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    torch.testing.assert_close(scores[..., 3:, 3:], scores[..., :-3, :-3], rtol=1e-4, atol=1e-4)
    assert (scores[..., 0, 1] - scores[..., 0, 5]).abs().min() > 1e-3
    with pytest.raises(ValueError, match="max_seq_len = 16"):
        rotary(*(torch.randn(1, 17, 2, 8) for _ in range(2)))


def test_encoder_tells_positions_apart_and_reads_all_of_them():
    encoder = seed.EncoderBlock(32, 4, 48, 6)
    context = torch.randn(2, 8, 32)
    z_logits = encoder(context)
    assert z_logits.shape == (2, 8, 6) and z_logits.std(dim=1).min() > 0
    context[:, 7] += 1
    assert (encoder(context)[:, 0] - z_logits[:, 0]).abs().min() > 0


def test_the_learned_query_of_the_encoder_is_zeta():
    encoder = seed.EncoderBlock(32, 4, 48, 6)
    assert isinstance(encoder.zeta, torch.nn.Parameter) and encoder.zeta.shape == (1, 1, 32)
    assert encoder.readout.weight.shape == (6, 32)
    assert sum(parameter is encoder.zeta for parameter in encoder.parameters()) == 1
    context = torch.randn(2, 8, 32)
    before = encoder(context)
    before.sum().backward()
    assert encoder.zeta.grad.abs().max() > 0
    with torch.no_grad():
        encoder.zeta.add_(1)
    assert not torch.equal(encoder(context), before)
    written_as_a_row = encoder.state_dict() | {"encoder.query": encoder.zeta.detach().flatten()}
    other = seed.EncoderBlock(32, 4, 48, 6)
    other.load_state_dict(written_as_a_row)
    assert torch.equal(other(context), encoder(context))


def test_mapper_is_one_hot_with_the_gradient_over_all_codes():
    mapper, table = seed.BinaryMapper(4).double(), torch.randn(16, 3, dtype=torch.float64)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    one_hot, cotangent = mapper(logits), torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(one_hot.sum(-1), torch.ones(2, 5)) and one_hot.unique().tolist() == [0, 1]
    ours = torch.autograd.grad((one_hot @ table * cotangent).sum(), logits)
    exact = torch.autograd.grad((code_lookup(table, one_hot.argmax(-1), logits) * cotangent).sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    assert not mapper.state_dict() and not list(mapper.buffers())
    sure = mapper.eval()(torch.tensor([[[50.0, -50, 50, -50]]], dtype=torch.float64))
    assert sure.argmax().item() == 0b0101  # bit i has the weight 2**i
    draws = mapper(torch.zeros(1, 200, 4, dtype=torch.float64)).sum(1)
    assert (draws > 0).sum() > 10  # drawn in evaluation too
    with pytest.raises(ValueError, match="latent_dim must be at most 16"):
        seed.BinaryMapper(17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_16_bits_are_one_hot_and_pass_their_gradient_on(dtype):
    mapper = seed.BinaryMapper()
    logits = torch.randn(1, 3, 16, dtype=dtype).mul(4).requires_grad_()
    one_hot = mapper(logits)
    assert one_hot.shape == (1, 3, mapper.onehot_dim) == (1, 3, 65536) and one_hot.dtype == torch.float32
    assert torch.equal(one_hot.sum(-1), torch.ones(1, 3)) and one_hot.unique().tolist() == [0, 1]
    table, cotangent = torch.randn(65536, 2), torch.randn(1, 3, 2)
    (ours,) = torch.autograd.grad((one_hot @ table * cotangent).sum(), logits)
    (exact,) = torch.autograd.grad((code_lookup(table, one_hot.argmax(-1), logits) * cotangent).sum(), logits)
    assert exact.abs().max() > 0
    torch.testing.assert_close(ours, exact)
    sure = torch.full((1, 1, 16), math.inf, requires_grad=True)
    mapper(sure)[..., 3].sum().backward()
    assert torch.equal(sure.grad, torch.zeros(1, 1, 16))


def test_a_sampled_plan_is_a_tensor():
    plan, code = seed.LatentPlan(16, 8), torch.tensor([[3, 65535]])
    prior = plan.sample_from_prior(2, 40, torch.device("cpu"))
    assert isinstance(prior, torch.Tensor) and prior.shape == (2, 40, plan.onehot_dim)
    assert torch.equal(prior.sum(dim=-1), torch.ones(2, 40)) and prior.argmax(-1).max() > 40000
    mixed = model.InjectionMechanism(8)(torch.ones(2, 40, 8), plan.project_to_hidden(prior))
    torch.testing.assert_close(mixed, 1 + plan.post_sampler.weight[prior.argmax(-1)])
    logits = torch.randn(1, 2, 16, requires_grad=True)
    drawn = plan.sample_from_logits(logits)
    torch.cat([drawn, drawn.roll(1, dims=1)]).flatten(0, 1)  # what is done with tensors
    cotangent = torch.randn(1, 2, 8)
    ours = torch.autograd.grad((plan.project_to_hidden(drawn) * cotangent).sum(), logits)[0]
    whole = Plan(drawn.argmax(-1), logits)
    exact = torch.autograd.grad((plan.project_to_hidden(whole) * cotangent).sum(), logits)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-8)
    assert torch.equal(plan.project_to_hidden(Plan(code)), plan.post_sampler.weight[code])
    assert list(plan.state_dict()) == ["post_sampler.weight"]
    with pytest.raises(ValueError, match="z_projected must be 8 wide"):
        model.InjectionMechanism(8)(torch.ones(1, 1, 8), torch.ones(1, 1, 7))


def test_an_offloaded_table_gives_one_hot_codes_their_vectors():
    plan = seed.LatentPlan(4, 8)
    one_hot = plan.sample_from_prior(2, 5)
    expected = plan.project_to_hidden(one_hot)
    cpu_offload(plan, execution_device="cpu")
    assert torch.equal(plan.project_to_hidden(one_hot), expected)


def test_the_hinge_is_taken_per_token_and_pads_are_not_counted():
    sure = torch.full((1, 1, 3), 40.0)  # three bits: 3 ln 2 nats
    z_logits = torch.cat([torch.zeros(1, 1, 3), sure], dim=1)
    three = 3 * math.log(2)
    assert losses.compute_kl_divergence(z_logits, 3, three / 2).item() == pytest.approx(three / 4)
    logits, targets = torch.zeros(1, 2, 7), torch.tensor([[2, -100]])
    loss, metrics = losses.compute_vae_loss(logits, targets, z_logits, 3, 2.0, 0.0)
    assert loss.item() == pytest.approx(math.log(7))
    _, metrics = losses.compute_vae_loss(logits, torch.tensor([[2, 3]]), z_logits, 3, 2.0, 0.5)
    assert metrics["loss/kl"] == pytest.approx((three - 0.5) / 2)
    assert metrics["loss/kl_weighted"] == pytest.approx(three - 0.5)
    assert metrics["loss/total"] == pytest.approx(math.log(7) + three - 0.5)
    assert metrics["metrics/kl_raw"] == pytest.approx(three / 2)
    assert metrics["metrics/perplexity"] == pytest.approx(7)
    wrapped, same = losses.FreeTransformerLoss(3, 2.0, 0.5)(logits, torch.tensor([[2, 3]]), z_logits)
    assert same == metrics and wrapped.item() == pytest.approx(metrics["loss/total"])
    half = torch.full((1, 2, 3), 20.0, dtype=torch.float16, requires_grad=True)
    losses.compute_kl_divergence(half, 3).backward()  # the original: NaN
    assert half.grad.isfinite().all()
    with pytest.raises(ValueError, match="z_logits must be 4 bits wide"):
        losses.compute_kl_divergence(z_logits, 4)


def test_the_schedule_ends_where_training_does():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = train_utils.LRScheduler(optimizer, 10, 3e-3, 1e-4, max_steps=100)
    rates = [schedule.step() for _ in range(100)]
    assert rates[0] == pytest.approx(3e-4) and rates[9] == pytest.approx(3e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(1e-4) and optimizer.param_groups[0]["lr"] == rates[-1]
    with pytest.raises(TypeError, match="max_steps"):
        train_utils.LRScheduler(optimizer, 10, 3e-3)
    with pytest.raises(ValueError, match="min_lr must be at most max_lr"):
        train_utils.LRScheduler(optimizer, 10, 1e-3, 1e-2, max_steps=100)


class PlanTrainer(train_utils.Trainer):
    def _compute_loss(self, batch):
        logits, z_logits = self.model(batch[0])
        return seed.compute_vae_loss(logits, batch[1], z_logits, latent_dim=5)


@pytest.mark.parametrize("use_amp", [False, True])
def test_trainer_learns_and_its_checkpoint_goes_on(use_amp, tmp_path):
    torch.manual_seed(0)
    rows = synthetic_data.SyntheticDataGenerator(50, 24, seed=3).generate_batch(8)
    batch = (rows[:, :-1], rows[:, 1:])
    made, other = free(), free(dropout=0.5)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    trainer = PlanTrainer(made, optimizer, torch.device("cpu"), use_amp=use_amp)
    losses_ = [trainer.train_step(batch, grad_clip=1.0)["loss/total"] for _ in range(25)]
    assert losses_[-1] < 0.8 * losses_[0] and trainer.step == 25
    before = {name: p.clone() for name, p in made.state_dict().items()}
    assert trainer.eval_step(batch)["loss/reconstruction"] < losses_[0] and made.training
    assert all(torch.equal(p, before[name]) for name, p in made.state_dict().items())
    path = tmp_path / "checkpoint"
    train_utils.save_checkpoint(made, optimizer, 25, path, metadata={"note": "half way"})
    assert load_checkpoint(path).config == made.model.config
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    on = [trainer.train_step(batch)["loss/total"] for _ in range(2)]
    made_again = seed.FreeTransformer(sizes())
    optimizer = torch.optim.AdamW(made_again.parameters(), lr=3e-3)
    assert train_utils.load_checkpoint(made_again, optimizer, path) == 25
    trainer = PlanTrainer(made_again, optimizer, torch.device("cpu"), use_amp=use_amp)
    assert [trainer.train_step(batch)["loss/total"] for _ in range(2)] == on
    assert train_utils.load_checkpoint(made_again, None, path) == 25
    with pytest.raises(ValueError, match="model must be of the checkpoint's config"):
        train_utils.load_checkpoint(other, None, path)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="path must be a folder"):
        train_utils.load_checkpoint(made, None, tmp_path / "model.pt")


def test_a_process_of_its_own_is_alone_and_has_nobody_to_share_with():
    assert train_utils.setup_distributed() == (0, 1, 0)
    train_utils.cleanup_distributed()
    model = seed.FreeTransformer(sizes())
    with pytest.raises(ValueError, match="model must be wrapped after setup_distributed, under torchrun"):
        train_utils.wrap_model_fsdp(model)


def test_training_config_survives_yaml_in_either_layout(tmp_path):
    made = config.TrainingConfig(max_steps=500, warmup_steps=20, batch_size=8)
    made.to_yaml(tmp_path / "own.yaml")
    assert config.TrainingConfig.from_yaml(tmp_path / "own.yaml") == made
    whole = "model:\n  hidden_dim: 64\ntraining:\n  max_steps: 500\n  warmup_steps: 20\n  batch_size: 8\ndata: {}\n"
    (tmp_path / "whole.yaml").write_text(whole)
    (tmp_path / "flat.yaml").write_text("max_steps: 500\nwarmup_steps: 20\nbatch_size: 8\n")
    for name in ("whole", "flat"):
        assert config.TrainingConfig.from_yaml(tmp_path / f"{name}.yaml") == made
    (tmp_path / "flat.yaml").write_text("max_step: 500\n")
    with pytest.raises(ValueError, match="training has no key 'max_step'; did you mean 'max_steps'"):
        config.TrainingConfig.from_yaml(tmp_path / "flat.yaml")
    with pytest.raises(ValueError, match="no readable YAML"):
        config.TrainingConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wandb_project="x"), "wandb_project must be left unset"),
        (dict(fsdp_config={"a": 1}), "fsdp_config must be left unset"),
        (dict(max_steps=10), "warmup_steps must be below max_steps = 10"),
        (dict(kappa_free_bits=-1.0), "kappa_free_bits must be a finite number of at least 0"),
    ],
)
def test_training_settings_that_cannot_be_honoured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config.TrainingConfig(**changes)
    with pytest.raises(ValueError, match="tokenizer_name must be None"):
        config.DataConfig(tokenizer_name="gpt2")


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_hooks_on_the_model_inside_run(mode):
    made, calls = free(), []
    made.model.register_forward_hook(lambda module, args, output: calls.append(output.logits))
    logits, _ = made(torch.randint(50, (2, 7)), mode=mode)
    assert len(calls) == 1 and torch.equal(calls[0], logits)
