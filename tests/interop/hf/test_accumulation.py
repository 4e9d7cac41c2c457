"""An update of transformers' Trainer is the one that was asked for, of every architecture."""

import gc

import pytest
import torch
from transformers import Trainer, TrainingArguments

from decoder_cases import tokens_of
from foreign_models import make
from helmholtz.interop.hf import HelmholtzTrainer, use_free_energy
from helmholtz.layers.latent import Plan
from helmholtz.models import MODELS
from helmholtz.ops.binary_latent import bits_to_code
from helmholtz.training.optim import parameter_groups
from hf_cases import make as make_ours
from hf_cases import of_architecture


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """Trainer collects garbage once per run, which takes seconds in a process of many tests."""
    gc.freeze()
    yield
    gc.unfreeze()


every_architecture = pytest.mark.parametrize("name", MODELS)
ASKED = [11, 2, 7, 1]
"""Labels asked of each row."""


def rows():
    tokens, found = tokens_of(4, 12, seed=3), []
    for row, asked in zip(tokens, ASKED, strict=True):
        labels = torch.where(torch.arange(12) < 12 - asked, -100, row)
        found.append({"input_ids": row, "labels": labels})
    return found


def plan_by_logits(model, monkeypatch):
    """Plans of a model that has them as a function of the text, so that two trainings have the same."""
    core = model.model
    if core.plan is not None:

        def sample(half, **_):
            logits = core.posterior(half)
            return Plan(bits_to_code(logits > 0), logits)

        monkeypatch.setattr(core, "sample_posterior", sample)


def run(model, folder, *, batch=4, trainer=Trainer, data=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    run = trainer(model=model, args=arguments, train_dataset=rows() if data is None else data)
    run.train()
    return run


def update(model, folder, **options):
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run(model, folder, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@every_architecture
def test_an_accumulated_update_is_that_of_the_whole_batch(name, tmp_path, monkeypatch):
    found = []
    for batch in (1, 4):
        model = of_architecture(name)
        plan_by_logits(model, monkeypatch)
        found.append(update(model, tmp_path, batch=batch))
    assert distance(*found) < 1e-6


@every_architecture
def test_label_smoothing_asks_for_the_next_token(name, tmp_path, monkeypatch):
    """Of this library's Trainer for the whole objective; of transformers' for models of which it is the whole."""
    model, smoothing = of_architecture(name), 0.2
    plan_by_logits(model, monkeypatch)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    model.train()
    plain = model(**batch).loss
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    asked = targets != -100
    nats = -logits.gather(2, targets.clamp(min=0)[..., None])[..., 0][asked].mean()
    even = -logits.mean(-1)[asked].mean()
    wanted = plain + smoothing * (even - nats)
    trainers = [HelmholtzTrainer, Trainer] if not model.config.objective else [HelmholtzTrainer]
    for trainer in trainers:
        done = run(model, tmp_path, trainer=trainer, label_smoothing_factor=smoothing, logging_steps=1)
        (loss,) = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        model = of_architecture(name)
        plan_by_logits(model, monkeypatch)


def test_a_loss_that_cannot_be_whole_is_told(tmp_path):
    model = of_architecture("free_transformer").train()
    with pytest.warns(UserWarning, match="HelmholtzTrainer smooths the whole objective"):
        model(tokens_of(1, 5), num_items_in_batch=torch.tensor(4))


@every_architecture
def test_weight_decay_falls_on_matrices_alone(name, tmp_path):
    model = of_architecture(name)
    wanted = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    trainer = HelmholtzTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]),
    )
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == wanted
    assert kept == {id(p) for p in model.parameters()} - wanted
    theirs = Trainer(model=model, args=trainer.args).get_decay_parameter_names(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
    assert bool(names & set(theirs)) == (name != "transformer")  # what is mended


def test_weight_decay_spares_temperatures_in_models_of_others(tmp_path):
    model = make("llama")
    use_free_energy(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    theirs, ours = (
        set(kind(model=model, args=arguments).get_decay_parameter_names(model))
        for kind in (Trainer, HelmholtzTrainer)
    )
    spared = {name.rpartition(".")[2] for name in theirs - ours}
    assert ours < theirs and spared == {"alpha", "log_beta"}


@every_architecture
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"every_n_layers": 2}], ids=str)
def test_gradients_with_checkpointing_are_those_without(name, options, tmp_path, monkeypatch):
    found, calls = [], []
    for enabled in (True, False):
        model = of_architecture(name, dropout=0.2).double()
        plan_by_logits(model, monkeypatch)
        for block in model.model.blocks:
            block.mixer.register_forward_hook(lambda *_: calls.append(1))
        found.append(
            update(model, tmp_path, activation_checkpointing=enabled, activation_checkpointing_kwargs=options)
        )
        assert model.is_activation_checkpointing == enabled
        model.activation_checkpointing_disable()
        assert not model.is_activation_checkpointing
        assert not any("forward" in vars(module) for module in model.modules())
    assert distance(*found) < 1e-10
    again = 1 if options.get("every_n_layers") else 2
    assert len(calls) == 2 + again + 2  # the mixers of two blocks: once, again, and once without


def test_trainer_trains_every_part_of_a_hybrid(tmp_path):
    model = make_ours("hybrid").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    done = run(model, tmp_path, logging_steps=1)
    assert all(entry["loss"] > 0 for entry in done.state.log_history if "loss" in entry)
    assert [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ] == []
