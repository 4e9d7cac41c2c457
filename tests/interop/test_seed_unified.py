"""The original spelling of Mamba-Hopfield-DEQ: every key acts, what has no meaning is refused, training goes on."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from helmholtz.interop.seeds import unified as seed
from helmholtz.interop.seeds.unified.objectives import read_batch
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.training.diagnosis import NonFiniteError

ROOT = Path(__file__).resolve().parents[2]
SHIMS = {
    "src.models.unified": {"UnifiedMambaHopfieldDEQ", "UnifiedModel", "UnifiedModelConfig"},
    "src.training.objectives": {"UnifiedTrainingObjective"},
    "src.training.trainer": {"CurriculumConfig", "UnifiedModelTrainer"},
    "experiments.theory.convergence_proofs": {"ConvergenceValidator"},
    "experiments.theory.energy_analysis": {"EnergyLandscapeAnalyzer"},
    "experiments.tasks.memory_tasks": {"AssociativeRecallExperiment", "ContinualLearningExperiment"},
}


def model_of(**options) -> seed.UnifiedMambaHopfieldDEQ:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_state=4, n_layers=1, memory_size=12)
    return seed.UnifiedMambaHopfieldDEQ(**sizes | options)


def ids_of(rows: int = 2, time: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(40, (rows, time), generator=torch.Generator().manual_seed(seed))


def trainer_of(model, batches, **options) -> seed.UnifiedModelTrainer:
    return seed.UnifiedModelTrainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches, **options)


def test_the_imports_of_the_original_are_this_facade(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "compat")
    for name, wanted in SHIMS.items():
        shim = importlib.import_module(name)
        assert set(shim.__all__) == wanted
        assert all(getattr(shim, n) is getattr(seed, n) for n in wanted)
    assert set.union(*SHIMS.values()) == set(seed.__all__)


def test_signatures_are_those_of_the_original():
    names = list(inspect.signature(seed.UnifiedMambaHopfieldDEQ).parameters)
    assert names[:8] == [
        "vocab_size", "d_model", "d_state", "d_conv", "n_layers", "memory_size", "beta", "solver_type",
    ]  # fmt: skip
    defaults = seed.UnifiedModelConfig(vocab_size=2)
    assert (defaults.d_model, defaults.d_state, defaults.d_conv, defaults.n_layers) == (512, 64, 4, 6)
    assert (defaults.memory_size, defaults.beta, defaults.max_iterations) == (1024, 2.0, 30)
    arguments = inspect.signature(seed.UnifiedMambaHopfieldDEQ).parameters
    for name, argument in arguments.items():
        assert name == "vocab_size" or argument.default == getattr(defaults, name), name
    assert set(arguments) == set(seed.UnifiedModelConfig.__slots__)
    generate = inspect.signature(seed.UnifiedMambaHopfieldDEQ.generate).parameters
    assert [generate[n].default for n in ("max_length", "temperature", "top_k")] == [100, 1.0, 50]


def test_every_key_reaches_the_model():
    model = model_of(
        d_conv=3, beta=3.0, solver_type="cascade", max_iterations=7, tol_fixedpoint=1e-4, tol_energy=1e-5,
        n_slots=2, stability="descent", max_seq_len=20,
    )  # fmt: skip
    core = model.model.config
    assert (core.d_model, core.d_state, core.d_conv, core.n_layers, core.n_patterns) == (16, 4, 3, 1, 12)
    assert (core.beta, core.n_slots, core.stability, core.max_seq_len) == (3.0, 2, "descent", 20)
    s = core.solver
    assert (s.mode, s.max_steps, s.rtol, s.energy_rtol) == ("cascade", 7, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, "'alpha' has no meaning here: the equilibrium is where"),
        ({"lambda_l2": 0.1}, "'lambda_l2' has no meaning"),
        ({"memory_sise": 4}, "no key 'memory_sise'; did you mean 'memory_size'"),
        ({"max_iterations": 0}, "max_steps must be an integer of at least 1"),
        ({"tol_fixedpoint": 0.0}, "must be a finite number above 0, got 0.0"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        seed.UnifiedMambaHopfieldDEQ.from_config({"d_model": 16, "n_layers": 1} | change, vocab_size=5)


def test_a_config_needs_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size"):
        seed.UnifiedMambaHopfieldDEQ.from_config({"d_model": 16})
    config = seed.UnifiedModelConfig(vocab_size=5, d_model=16, d_state=4, n_layers=1, memory_size=4)
    assert seed.UnifiedMambaHopfieldDEQ.from_config(config).config == config


@torch.no_grad()
def test_diagnostics_come_with_a_start_even_if_it_is_none():
    model = model_of().eval()
    logits = model(ids_of())
    for options in ({"z_init": None}, {"return_diagnostics": True}):
        pair = model(ids_of(), **options)
        assert torch.equal(pair[0], logits) and pair[1]["z_equilibrium"].shape == (2, 9, 16)


def test_diagnostics_say_what_the_solver_did():
    _, found = model_of(max_iterations=50, tol_fixedpoint=1e-6)(ids_of(), return_diagnostics=True)
    info = found["solver_info"]
    assert info["converged"] is True and info["converged_fraction"] == 1.0
    assert info["final_fp_residual"] <= 1e-6 and info["lipschitz_certificate"] < 0.9
    total = sum(info["energy_components"].values())
    assert total == pytest.approx(info["final_energy"], rel=1e-4)
    assert info["iterations"] == int(info["per_token"]["iterations"].max()) > 1
    assert found["memory_usage"]["num_patterns"] == 12
    assert found["memory_usage"]["top_10_mass"] <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(3, 9, 16), (2, 9, 8), (2, 8, 16), (3, 16), (16,)])
def test_a_start_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match="z_init") as error:
        model_of()(ids_of(), z_init=torch.zeros(shape))
    assert "(2, 9, 16)" in str(error.value) and str(shape) in str(error.value)


def test_solver_attributes_can_be_assigned_and_are_checked():
    model = model_of()
    model.solver.max_iter = 1
    with pytest.warns(UserWarning, match="have not converged after 1 steps"):
        _, found = model(ids_of(), return_diagnostics=True)
    assert found["solver_info"]["iterations"] == 1 and not found["solver_info"]["converged"]
    with pytest.raises(ValueError, match="max_steps"):
        model.solver.max_iter = 0
    with pytest.raises(AttributeError):
        model.solver.max_iterations = 5
    model.solver.tolerance = 0.5
    assert (model.solver.tolerance, model.solver.tol_fixedpoint, model.solver.tol_energy) == (0.5, 0.5, 0.5)
    model.solver.max_iter = 50
    _, found = model(ids_of(), return_diagnostics=True)
    assert found["solver_info"]["converged"] and found["solver_info"]["final_fp_residual"] <= 0.5


def test_generation_counts_the_prompt():
    model, prompt = model_of().eval(), ids_of(2, 3)
    text = model.generate(prompt, max_length=8, top_k=1)
    assert text.shape == (2, 8) and torch.equal(text[:, :3], prompt)
    assert torch.equal(model.generate(prompt, 8, 1.0, 1), text)
    torch.manual_seed(5)
    sampled = [model.generate(prompt, max_length=8, top_k=100)]
    torch.manual_seed(5)
    sampled.append(model.generate(prompt, max_length=8, top_k=100))
    assert torch.equal(*sampled)
    with pytest.raises(ValueError, match="max_length must be above the prompt's 3"):
        model.generate(prompt, max_length=3)


def test_batches_come_in_three_forms():
    ids = ids_of()
    labels = torch.full_like(ids, -100)
    for batch in (ids, (ids,), {"input_ids": ids}):
        assert torch.equal(read_batch(batch)[0], ids[:, :-1]) and torch.equal(
            read_batch(batch)[1], ids[:, 1:]
        )
    for batch in ((ids, labels), {"input_ids": ids, "labels": labels}):
        assert read_batch(batch)[0] is ids and read_batch(batch)[1] is labels
    for batch in (ids[0], (ids, ids, ids), (ids, ids[:, 1:]), {"ids": ids}):
        with pytest.raises(ValueError, match="batch|targets"):
            read_batch(batch)


def test_each_term_is_reported_and_weighs_in():
    model, ids = model_of(stability="descent"), ids_of()
    weights = {"task_weight": 0.5, "energy_weight": 2.0, "convergence_weight": 3.0, "stability_weight": 4.0}
    loss, metrics = seed.UnifiedTrainingObjective(**weights, contraction_target=0.01).compute_loss(model, ids)
    terms = {
        name.removesuffix("_weight"): weight * metrics[name.removesuffix("_weight")]
        for name, weight in weights.items()
    }
    assert all(value > 0 for value in terms.values())
    assert sum(terms.values()) == pytest.approx(loss.item(), rel=1e-5)
    without = seed.UnifiedTrainingObjective(energy_weight=0, convergence_weight=0, stability_weight=0)
    assert without.compute_loss(model, ids)[1].keys().isdisjoint({"energy", "convergence", "stability"})
    with pytest.raises(ValueError, match="energy_weight"):
        seed.UnifiedTrainingObjective(energy_weight=-1.0)


def test_training_learns_and_validates():
    batch = torch.arange(10).repeat(4, 3)[:, :17]
    trainer = trainer_of(model_of(), [batch] * 10, val_loader=[batch])
    history = trainer.train(num_epochs=3, progress=False)
    assert len(history) == 3 and trainer.step == 30
    assert history[-1]["val_task"] < 0.5 * history[0]["task"]
    assert history[-1]["val_converged_fraction"] == 1.0


def test_the_curriculum_acts_in_training_and_leaves_the_solver_alone():
    curriculum = seed.CurriculumConfig(
        warmup_steps=1, stage_steps=1, max_iter_schedule=(1, 2, 9), tolerance_schedule=(1e-6, 1e-7, 1e-8)
    )
    model = model_of()
    trainer = trainer_of(model, [ids_of()], curriculum=curriculum)
    steps = [trainer.train_step(ids_of())["num_iterations"] for _ in range(3)]
    assert steps[:2] == [1, 2] and 2 < steps[2] <= 9
    assert (model.solver.max_iter, model.solver.tol_fixedpoint) == (30, 1e-3)
    with pytest.raises(ValueError, match="tolerance_schedule must be as long"):
        seed.CurriculumConfig(max_iter_schedule=(1, 2))


def test_training_writes_into_slots_once_the_curriculum_says_so():
    model = model_of(n_slots=4)
    trainer = trainer_of(model, [ids_of()], curriculum=seed.CurriculumConfig(memory_enable_step=1))
    trainer.train_step(ids_of())
    assert not model.model.memory.occupied.any()
    trainer.train_step(ids_of())
    assert model.model.memory.occupied.any()


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    batches = [ids_of(seed=s) for s in range(4)]
    one, two = (trainer_of(model_of(n_slots=3), batches) for _ in range(2))
    for batch in batches[:2]:
        one.train_step(batch)
    one.save_checkpoint(tmp_path / "last")
    two.load_checkpoint(tmp_path / "last")
    assert two.step == 2
    for batch in batches[2:]:
        assert one.train_step(batch) == two.train_step(batch)
    loaded = load_checkpoint(tmp_path / "last")
    assert type(loaded).__name__ == "MambaHopfield"
    with pytest.raises(ValueError, match="model"):
        trainer_of(model_of(memory_size=5), batches).load_checkpoint(tmp_path / "last")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = model_of()
    trainer = trainer_of(model, [ids_of()])
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    before = model.memory_patterns.detach().clone()
    with pytest.raises(NonFiniteError, match="step 1: the loss is"):
        trainer.train_step(ids_of())
    assert torch.equal(model.memory_patterns, before)


def test_tools_want_the_equilibrium_of_one_call(tmp_path):
    model = model_of()
    analyzer = seed.EnergyLandscapeAnalyzer(model, tmp_path)
    _, found = model(ids_of(), return_diagnostics=True)
    with pytest.raises(ValueError, match="context must be given together"):
        analyzer.visualize_2d_slice(found["z_equilibrium"])
    with pytest.raises(ValueError, match="z_equilibrium must be that of the same call"):
        analyzer.visualize_2d_slice(found["z_equilibrium"] + 1, found["context"])
    quiet = seed.EnergyLandscapeAnalyzer(model, None)
    assert quiet.visualize_2d_slice(found["z_equilibrium"], found["context"], resolution=5).energy.shape == (
        5,
        5,
    )
    assert list(tmp_path.iterdir()) == []


def test_means_over_batches_count_targets_alike():
    """The last batch is smaller, and some of its targets are ignored: the mean is that of one batch of all."""
    model, ids, targets = model_of(), ids_of(5, 8), ids_of(5, 8, seed=2)
    targets[4, :6] = -100
    parts = [(ids[:4], targets[:4]), (ids[4:], targets[4:])]
    found = trainer_of(model, [], val_loader=parts).validate()
    whole = trainer_of(model, [], val_loader=[(ids, targets)]).validate()
    assert found["task"] == pytest.approx(whole["task"], rel=1e-5)
    first, last = (trainer_of(model, [], val_loader=[part]).validate()["task"] for part in parts)
    assert abs(found["task"] - (first + last) / 2) > 1e-3
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    (epoch,) = seed.UnifiedModelTrainer(model, frozen, parts).train(1, progress=False)
    assert epoch["task"] == pytest.approx(whole["task"], rel=1e-5)
