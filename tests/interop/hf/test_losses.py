import pytest
import torch
import torch.nn.functional as F

from decoder_cases import tokens_of
from helmholtz.interop.hf import HelmholtzConfig
from helmholtz.layers.equilibrium_reading import start_distance
from helmholtz.ops.binary_latent import bits_to_nats, kl_per_token
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig
from hf_cases import ONE_OF_EACH, WITHOUT_PLAN, make


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name in WITHOUT_PLAN])
def test_in_evaluation_the_loss_is_the_cross_entropy_of_the_next_token(name):
    model, tokens = make(name), tokens_of(2, 9)
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, shifted(model(tokens).logits, tokens))
    assert torch.equal(output.logits, model(tokens).logits)


def test_labels_of_minus_100_and_pads_do_not_count():
    model, tokens = make("fem-hybrid-untied"), tokens_of(2, 9)
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[0, :5] = labels[1, -2:] = -100
    mask[1, -2:] = 0
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, shifted(model(tokens, attention_mask=mask).logits, labels))
    other = torch.where(mask == 1, tokens, 5)
    assert torch.equal(model(other, attention_mask=mask, labels=labels).loss, loss)
    assert model(tokens, labels=torch.full_like(tokens, -100)).loss == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_plan_costs_what_free_bits_or_the_elbo_say(training):
    model, tokens = make("free").train(training), tokens_of(2, 9)
    model.config.objective = {"kappa_bits": 0.2}
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[0, 6:], mask[0, 6:] = -100, 0
    torch.manual_seed(4)
    output = model(tokens, attention_mask=mask, labels=labels)
    torch.manual_seed(4)
    half = model.model.lower(tokens, attention_mask=mask)
    plan = model.model.sample_posterior(half)
    nats = shifted(model.model.upper(half, plan).logits, labels)
    kl = kl_per_token(plan.logits)[mask == 1]
    charge = F.relu(kl - bits_to_nats(0.2)) if training else kl
    expected = nats + charge.sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(output.loss, expected)
    assert output.loss > nats + 0.05


def test_the_gradient_reaches_the_encoder():
    model, tokens = make("free").train(), tokens_of(2, 9)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.model.encoder.readout.weight.grad.abs().max() > 0


def test_equilibria_are_trained_as_by_this_librarys_objective():
    model, tokens = make("mamba-hopfield").train(), tokens_of(2, 9)
    loss = model(tokens[:, :-1], labels=tokens[:, :-1]).loss
    output = model.model(tokens[:, :-1])
    distance = start_distance(model.model.equilibrium, output.equilibrium).mean()
    # of 8 tokens 7 are asked for
    torch.testing.assert_close(loss, shifted(output.logits, tokens[:, :-1]) + 0.05 * distance * 8 / 7)
    # the same terms as those of the trainer, which asks for one token more
    ours = EquilibriumObjective(EquilibriumObjectiveConfig())(model.model, tokens, 0)
    torch.testing.assert_close(ours.terms["convergence"], distance)
    model.config.objective["convergence_weight"] = 0.0
    weightless = model(tokens[:, :-1], labels=tokens[:, :-1]).loss
    torch.testing.assert_close(weightless, shifted(output.logits, tokens[:, :-1]))


def test_the_defaults_are_those_of_the_trainer():
    core = make("free").config
    assert core.objective["kappa_bits"] == FreeBitsConfig().kappa_bits
    hopfield = HelmholtzConfig.of("mamba_hopfield", make("mamba-hopfield").model.config)
    assert hopfield.objective["convergence_weight"] == EquilibriumObjectiveConfig().convergence_weight


def test_a_plan_seed_says_nothing_where_the_encoder_plans():
    model, tokens = make("free"), tokens_of(1, 5)
    with pytest.raises(ValueError, match="plan_seed must be None with labels"):
        model(tokens, labels=tokens, plan_seed=1)


def test_a_hybrids_loss_is_of_its_plan_and_of_its_equilibria():
    model, tokens = make("hybrid").train(), tokens_of(2, 9)
    assert model.config.objective == {"kappa_bits": 0.5, "convergence_weight": 0.05}
    torch.manual_seed(5)
    loss = model(tokens, labels=tokens).loss
    core = model.model
    torch.manual_seed(5)
    half = core.lower(tokens)
    plan = core.sample_posterior(half)
    output = core.upper(half, plan)
    charge = torch.nn.functional.relu(kl_per_token(plan.logits) - bits_to_nats(0.5)).sum()
    distance = start_distance(core.equilibrium, output.equilibrium).sum()
    assert charge > 0 and distance > 0
    torch.testing.assert_close(loss, shifted(output.logits, tokens) + (charge + 0.05 * distance) / 16)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
