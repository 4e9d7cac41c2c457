"""The objective of equilibrium models: its terms and whom they reach, its curriculum, its writes, its report."""

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch

from distributed_cases import distributed_run
from equilibrium_cases import jacobians, make_model
from helmholtz.layers.equilibrium_reading import equilibrium_statistics, retrieval_energy, start_distance
from helmholtz.models import Transformer
from helmholtz.models.transformer import TransformerConfig
from helmholtz.ops import cross_entropy
from helmholtz.solvers import SolverConfig
from helmholtz.solvers.spectrum import local_lipschitz, top_eigenvector
from helmholtz.training.callbacks import Callback
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.equilibrium import (
    EquilibriumObjective,
    EquilibriumObjectiveConfig,
    SolverStage,
    contraction_excess,
    training_solver,
)
from helmholtz.training.loop import Trainer
from helmholtz.training.objectives import last_tokens, next_token
from helmholtz.training.run import train
from tiny_runs import prepare_text

ALONE = {"energy_weight": 0.0, "convergence_weight": 0.0, "stability_weight": 0.0}
ALL = EquilibriumObjectiveConfig(
    energy_weight=0.3, convergence_weight=0.2, stability_weight=0.7, contraction_target=0.1
)


@pytest.fixture
def model():
    return make_model().train()


@pytest.fixture
def tokens():
    return torch.randint(37, (3, 13), generator=torch.Generator().manual_seed(1))


def found_of(model, tokens):
    return model(tokens[:, :-1]).equilibrium


def collapsed_to_zero():
    """A model whose equilibria are all 0 up to rounding: no injection, no past, patterns in opposite pairs."""
    model = make_model(n_patterns=2).train()
    with torch.no_grad():
        model.equilibrium.dynamics.u_proj.weight.zero_()
        model.equilibrium.dynamics.start_proj.weight.zero_()
        patterns = model.memory_patterns
        patterns[1].copy_(-patterns[0])
    return model, torch.randint(37, (4, 2))


# --- the terms


def test_the_loss_is_the_cross_entropy_and_the_weighted_terms(model, tokens):
    found = found_of(model, tokens)
    nats = cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:])
    objective = EquilibriumObjective(ALL)(model, tokens, 0)
    z, parameters = found.z.flatten(0, 1), found.parameters
    radius = model.config.d_model**0.25
    direction = radius * z / z.norm(dim=-1, keepdim=True)
    scores = parameters.beta * (direction.double() @ parameters.patterns.double().T)
    energy = radius**2 - (scores.exp().sum(-1) / len(parameters.patterns)).log() / parameters.beta
    distance = (found.z_init - found.z).square().sum(-1) / found.z.square().sum(-1)
    terms = {name: term.item() for name, term in objective.terms.items()}
    assert terms["cross_entropy"] == pytest.approx(nats.item(), rel=1e-6)
    assert terms["energy"] == pytest.approx(energy.mean().item(), rel=1e-4)
    assert terms["convergence"] == pytest.approx(distance.mean().item(), rel=1e-4)
    assert terms["stability"] == contraction_excess(found, 0.1).item() > 1e-3
    total = nats + 0.3 * terms["energy"] + 0.2 * terms["convergence"] + 0.7 * terms["stability"]
    assert objective.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms["num_steps"] == pytest.approx(found.solution.num_steps.double().mean().item())
    assert terms["num_steps"] > 1
    assert terms["unconverged"] == 0
    assert objective.bound.item() == terms["cross_entropy"]
    assert not objective.bound.requires_grad
    assert not any(term.requires_grad for term in objective.terms.values())


def gradients(model, tokens, term):
    """Names of the parameters whose gradient of ``term`` is not 0."""
    model.zero_grad()
    term(found_of(model, tokens)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_term_reaches_the_parameters_it_is_meant_for_and_no_others(model, tokens):
    layer, everything = model.equilibrium, {name for name, _ in model.named_parameters()}
    start, output = "equilibrium.dynamics.start_proj.weight", {"equilibrium.o_proj.weight", "norm.weight"}
    assert gradients(model, tokens, lambda found: start_distance(layer, found).mean()) == {start}
    energy = gradients(model, tokens, lambda found: retrieval_energy(layer, found).mean())
    assert energy == everything - {start} - output
    stability = gradients(model, tokens, lambda found: contraction_excess(found, 0.1))
    # u moves the equilibrium, which counts as constant
    assert stability == everything - {start, "equilibrium.dynamics.u_proj.weight"} - output


def test_with_all_terms_every_parameter_gets_a_gradient(model, tokens):
    EquilibriumObjective(ALL)(model, tokens, 0).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_all_terms_and_gradients_are_finite_at_equilibria_of_zero():
    model, tokens = collapsed_to_zero()
    assert found_of(model, tokens).z.abs().max() < 1e-6
    objective = EquilibriumObjective(ALL)(model, tokens, 0)
    objective.loss.backward()
    assert all(term.isfinite() for term in objective.terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert objective.terms["energy"].item() == pytest.approx(model.memory.radius**2)


def test_an_equilibrium_of_exactly_zero_has_the_energy_of_no_direction(model, tokens):
    found = found_of(model, tokens)
    z = torch.zeros_like(found.z, requires_grad=True)
    found = replace(found, z=z)
    energy = retrieval_energy(model.equilibrium, found)
    torch.testing.assert_close(energy, torch.full_like(energy, model.memory.radius**2))
    (gradient,) = torch.autograd.grad(energy.sum(), z)
    assert gradient.isfinite().all()
    assert gradient.norm(dim=-1).max() < 2e3 * model.memory.radius
    assert start_distance(model.equilibrium, found).isfinite().all()


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_the_retrieval_energy_is_bounded_whatever_the_patterns_and_equilibria_are(seed, scale):
    model = make_model(n_patterns=5)
    with torch.no_grad():
        model.memory_patterns.copy_(scale * torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)))
        model.equilibrium.dynamics.u_proj.weight.mul_(scale)
        energy = retrieval_energy(model.equilibrium, found_of(model, torch.randint(37, (2, 6))))
    assert energy.min() >= -1e-5
    assert energy.max() <= 2 * model.memory.radius**2 + 1e-5


def test_the_retrieval_energy_counts_the_patterns_that_are_there(model, tokens):
    """Empty slots change nothing."""
    with_slots = make_model(n_slots=6).train()
    values = [retrieval_energy(m.equilibrium, found_of(m, tokens)) for m in (model, with_slots)]
    torch.testing.assert_close(*values)


def test_the_local_lipschitz_constant_is_the_largest_eigenvalue(model, tokens):
    found = found_of(model, tokens)
    z = found.z.flatten(0, 1).detach()
    exact = torch.linalg.eigvalsh(jacobians(found.problem, z))[:, -1]
    generator = torch.Generator().manual_seed(0)
    few, many = (
        local_lipschitz(found.problem, z, steps=n, generator=generator.manual_seed(0)) for n in (2, 200)
    )
    torch.testing.assert_close(many, exact, rtol=1e-3, atol=1e-5)
    assert (few <= exact + 1e-6).all()
    v = top_eigenvector(found.problem, z, steps=3, generator=generator)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(len(z)))
    assert not v.requires_grad


def test_the_gradient_of_the_stability_term_is_that_of_the_largest_eigenvalue(model, tokens):
    """Hellmann and Feynman: v counts as constant. Against autograd through the dense eigenvalues."""
    found = found_of(model, tokens)
    theta = model.equilibrium.dynamics.theta
    points = [x.flatten(0, 1).detach() for x in (found.z, found.z_init)]
    largest = [torch.linalg.eigvalsh(jacobians(found.problem, z))[:, -1] for z in points]
    expected = torch.stack([(x - 0.1).relu().square().mean() for x in largest]).mean()
    wanted = torch.autograd.grad(expected, theta, retain_graph=True)[0]
    (actual,) = torch.autograd.grad(contraction_excess(found, 0.1), theta)
    torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())


def test_a_contractive_model_pays_nothing_for_the_target_it_keeps_by_construction(model, tokens):
    assert contraction_excess(found_of(model, tokens), 0.9) == 0


def test_a_weight_of_zero_costs_nothing(model, tokens, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("was computed")

    for name in ("contraction_excess", "retrieval_energy", "start_distance"):
        monkeypatch.setattr(f"helmholtz.training.equilibrium.{name}", fail)
    objective = EquilibriumObjective(EquilibriumObjectiveConfig(**ALONE))(model, tokens, 0)
    assert list(objective.terms) == ["cross_entropy", "num_steps", "unconverged"]
    plain = next_token(model, tokens, 0)
    assert torch.equal(objective.loss, plain.loss)
    for weight in ("energy_weight", "convergence_weight", "stability_weight"):
        with pytest.raises(AssertionError, match="was computed"):
            EquilibriumObjective(EquilibriumObjectiveConfig(**ALONE | {weight: 1.0}))(model, tokens, 0)


def test_only_the_last_tokens_may_be_asked_for(model, tokens):
    found = EquilibriumObjective(EquilibriumObjectiveConfig(), n_targets=2)(model, tokens, 0)
    logits = model(tokens[:, :-1]).logits.double().log_softmax(-1)[:, -2:]
    wanted = -logits.gather(-1, tokens[:, -2:, None]).mean().item()
    assert found.bound.item() == pytest.approx(wanted, rel=1e-5)
    assert last_tokens(2)(model, tokens, 0).loss.item() == pytest.approx(wanted, rel=1e-5)


def test_another_model_is_refused(tokens):
    plain = Transformer(TransformerConfig(vocab_size=37, d_model=16, n_layers=1))
    objective = EquilibriumObjective(EquilibriumObjectiveConfig())
    for call in (lambda: objective(plain, tokens, 0), lambda: objective.report(plain, [tokens], 0)):
        with pytest.raises(ValueError, match="equilibrium: wanted .*, got a Transformer without one"):
            call()


STAGE = {"from_step": 0, "max_steps": 5, "rtol": 1e-2}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"energy_weight": -1.0}, "objective.energy_weight must be a finite number of at least 0, got -1.0"),
        ({"stability_weight": float("nan")}, "objective.stability_weight must be a finite number of at least 0"),
        ({"contraction_target": -0.1}, "objective.contraction_target must be a finite number of at least 0"),
        ({"memory_lr_factor": 0.0}, "objective.memory_lr_factor must be a finite number above 0, got 0.0"),
        ({"memory_write_step": -1}, "objective.memory_write_step must be an integer of at least 0, got -1"),
        ({"curriculum": (SolverStage(**STAGE), SolverStage(**STAGE))},
         "objective.curriculum must be stages with growing from_step, got [0, 0]"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EquilibriumObjectiveConfig(**setting)


@pytest.mark.parametrize(("name", "value"), [("from_step", -1), ("max_steps", 0), ("rtol", 0.0)])
def test_a_bad_stage_is_named(name, value):
    with pytest.raises(ValueError, match=f"objective.curriculum.{name} must be"):
        SolverStage(**STAGE | {name: value})


# --- the curriculum


CURRICULUM = (
    SolverStage(from_step=2, max_steps=3, rtol=1e-1),
    SolverStage(from_step=5, max_steps=7, rtol=1e-2),
)
OWN = SolverConfig(mode="cascade", max_steps=11, rtol=1e-4, energy_rtol=1e-5, anderson_window=3)


def solvers_used(model, config, steps, tokens):
    """The solver during each call of the objective."""
    used = []
    handle = model.equilibrium.register_forward_hook(lambda layer, args, out: used.append(layer.solver))
    for step in steps:
        EquilibriumObjective(config)(model, tokens, step)
    handle.remove()
    return used


def test_the_curriculum_sets_steps_and_tolerances_and_leaves_the_model_its_solver(model, tokens):
    model.solver = OWN
    config = EquilibriumObjectiveConfig(curriculum=CURRICULUM)
    used = solvers_used(model, config, [0, 1, 2, 4, 5, 99], tokens)
    assert [(s.max_steps, s.rtol, s.energy_rtol) for s in used] == [
        *[(11, 1e-4, 1e-5)] * 2, *[(3, 1e-1, 1e-1)] * 2, *[(7, 1e-2, 1e-2)] * 2
    ]  # fmt: skip
    assert {(s.mode, s.anderson_window) for s in used} == {("cascade", 3)}
    assert model.solver is OWN


def test_evaluation_uses_the_models_own_solver_at_every_step(model, tokens):
    model.solver = OWN
    objective = EquilibriumObjective(EquilibriumObjectiveConfig(curriculum=CURRICULUM))
    used = solvers_used(model.eval(), objective.config, [0, 3, 6], tokens)
    handle = model.equilibrium.register_forward_hook(lambda layer, args, out: used.append(layer.solver))
    objective.report(model, [tokens], 6)
    handle.remove()
    assert {(s.max_steps, s.rtol, s.energy_rtol) for s in used} == {(11, 1e-4, 1e-5)}


def test_the_solver_is_restored_after_an_exception(model, tokens):
    model.solver = OWN
    for training in (True, False):
        with pytest.raises(ValueError, match="vocabulary"):
            EquilibriumObjective(EquilibriumObjectiveConfig(curriculum=CURRICULUM))(
                model.train(training), tokens + 37, 3
            )
        assert model.solver is OWN


def test_unconverged_tokens_are_counted_and_not_warned_of(model, tokens):
    model.solver = SolverConfig(max_steps=1, rtol=1e-6)
    objective = EquilibriumObjective(EquilibriumObjectiveConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms = objective(model, tokens, 0).terms
        report = objective.report(model.eval(), [tokens, tokens], 0)
    assert terms["unconverged"] == 1
    assert terms["num_steps"] == 1
    assert report.statistics["converged"] == 0
    assert "72 of 72 tokens did not converge" in report.warnings["unconverged"]


def test_a_solver_that_raises_still_raises_except_in_a_stage(model, tokens):
    model.solver = SolverConfig(max_steps=1, rtol=1e-6, on_nonconvergence="raise")
    objective = EquilibriumObjective(EquilibriumObjectiveConfig(curriculum=CURRICULUM))
    with pytest.raises(RuntimeError, match="not converged"):
        objective(model, tokens, 0)
    assert objective(model, tokens, 2).loss.isfinite()
    with training_solver(model, None):
        assert model.solver.on_nonconvergence == "raise"


# --- the memory's slots


def test_training_writes_equilibria_from_the_step_on_and_evaluation_never(tokens):
    model = make_model(n_slots=8).train()
    objective = EquilibriumObjective(EquilibriumObjectiveConfig(memory_write_step=3))
    for step, training, slots in [(2, True, 0), (3, False, 0), (3, True, 8)]:
        model.train(training)
        objective(model, tokens, step)
        assert int(model.memory.occupied.sum()) == slots
    model.eval()
    before = model.memory.store.rows.clone()
    objective.report(model, [tokens], 5)
    objective(model, tokens, 5)
    assert torch.equal(model.memory.store.rows, before)


def test_a_step_that_writes_has_the_gradient_of_the_memory_before(tokens):
    gradients = []
    for step in (None, 0):
        model = make_model(n_slots=8).train()
        objective = EquilibriumObjective(EquilibriumObjectiveConfig(memory_write_step=step))
        objective(model, tokens, 0).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert bool(model.memory.occupied.any()) == (step is not None)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_without_a_step_nothing_is_written(tokens):
    model = make_model(n_slots=8).train()
    EquilibriumObjective(EquilibriumObjectiveConfig())(model, tokens, 10**6)
    assert not model.memory.occupied.any()


# --- the report


def test_the_report_is_of_all_batches_under_the_models_own_solver(model, tokens):
    model.eval()
    other = torch.randint(37, (2, 9))
    report = EquilibriumObjective(EquilibriumObjectiveConfig()).report(model, [tokens, other], 0)
    found = [model(batch[:, :-1]).equilibrium for batch in (tokens, other)]
    s, steps = report.statistics, torch.cat([f.solution.num_steps for f in found]).double()
    assert report.warnings == {}
    assert s["n_tokens"] == len(steps) == 36 + 16
    assert (s["converged"], s["max_steps"]) == (1, steps.max())
    assert s["mean_steps"] == pytest.approx(steps.mean().item())
    for name, values in {
        "energy": [f.solution.energy for f in found],
        "residual": [f.solution.residual for f in found],
        "retrieval_entropy": [-(f.weights() * f.weights().log()).sum(-1) for f in found],
        "retrieval_energy": [retrieval_energy(model.equilibrium, f) for f in found],
        "start_distance": [start_distance(model.equilibrium, f) for f in found],
    }.items():
        assert s[name] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4), name
    usage = torch.cat([f.weights() for f in found]).mean(0)
    assert s["usage_entropy"] == pytest.approx(-(usage * usage.log()).sum().item(), rel=1e-4)
    exact = torch.linalg.eigvalsh(jacobians(found[0].problem, found[0].z.flatten(0, 1)))[:, -1].max().item()
    assert s["lipschitz_local"] == pytest.approx(exact, rel=0.02)
    assert s["lipschitz_local"] <= s["lipschitz_certificate"] <= s["contraction_bound"] < 0.9
    assert s["slots_used"] == 0


def test_the_report_counts_the_slots_in_use(tokens):
    model = make_model(n_slots=40).train()
    EquilibriumObjective(EquilibriumObjectiveConfig(memory_write_step=0))(model, tokens, 0)
    statistics = equilibrium_statistics(model.equilibrium, [found_of(model.eval(), tokens)])
    assert statistics["slots_used"] == int(model.memory.occupied.sum()) > 3


def test_a_retrieval_of_the_mean_pattern_is_named_with_what_may_help(model, tokens):
    model.eval()
    with torch.no_grad():
        model.memory_patterns[1:] = model.memory_patterns[0]
    warning = EquilibriumObjective(EquilibriumObjectiveConfig()).report(model, [tokens], 0).warnings
    assert list(warning) == ["retrieval_collapsed"]
    assert "entropy 2.48 of at most ln 12 = 2.48 nats" in warning["retrieval_collapsed"]
    assert "a larger model.beta" in warning["retrieval_collapsed"]


def test_one_pattern_cannot_collapse(tokens):
    report = EquilibriumObjective(EquilibriumObjectiveConfig()).report(make_model(n_patterns=1), [tokens], 0)
    assert report.warnings == {}
    assert report.statistics["retrieval_entropy"] == 0


def test_an_evaluation_leaves_the_generators_alone(model, tokens):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    EquilibriumObjective(ALL)(model.eval(), tokens, 0)
    EquilibriumObjective(ALL).report(model, [tokens], 0)
    assert torch.equal(torch.get_rng_state(), state)


class Poison(Callback):
    """After a step, the embeddings are NaN."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_step(self, record):
        if record.step == self.step:
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(torch.nan)


def train_poisoned(tmp_path, architecture, *, eval_every=100):
    """Of a run that saves every second step the embeddings are NaN after the third; the error and its report."""
    run = distributed_run(
        prepare_text(tmp_path),
        architecture=architecture,
        output=tmp_path / "run",
        train={"steps": 6, "save_every": 2, "eval_every": eval_every},
    )
    poison = Poison(3)
    with MonkeyPatch.context() as patch, pytest.raises(NonFiniteError) as caught:
        made = Trainer.__init__
        patch.setattr(
            Trainer,
            "__init__",
            lambda self, *a, **k: (made(self, *a, **k), setattr(poison, "trainer", self))[0],
        )
        train(run, callbacks=[poison])
    return str(caught.value), json.loads((tmp_path / "run" / "non_finite.json").read_text())


def test_a_start_that_is_not_finite_ends_the_run_with_the_first_bad_tensor(tmp_path):
    error, report = train_poisoned(tmp_path, "mamba_hopfield")
    assert re.search(r"step 4: the context must be finite .* first seen in parameter embed", error)
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert report["step"] == 4 and report["first"].startswith("parameter embed.weight: 4,112 of 4,112 ")
    assert (tmp_path / "run" / "last").resolve().name == "step-00000002"


@pytest.mark.parametrize(
    ("architecture", "what"),
    [("transformer", "the validation loss is nan"), ("mamba_hopfield", "the context must be finite")],
)
def test_a_validation_loss_that_is_not_finite_names_the_first_bad_tensor(tmp_path, architecture, what):
    error, report = train_poisoned(tmp_path, architecture, eval_every=3)
    assert what in error and "first seen in parameter embed.weight" in error
    assert report["what"].startswith(what) and report["first"].startswith("parameter embed.weight")
    assert (tmp_path / "run" / "last").resolve().name == "step-00000002"
