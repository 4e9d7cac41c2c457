"""The objective is a sum over the parts that a model has."""

from dataclasses import replace

import pytest
import torch

from decoder_cases import tokens_of
from helmholtz.layers.base import AbstractMixer
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.equilibrium import EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig
from helmholtz.training.objectives import next_token
from helmholtz.training.parts import HybridObjective, HybridObjectiveConfig, objective_class, objective_of
from helmholtz.training.run import train
from hybrid_cases import EQUILIBRIA, PLANS, hybrid, hybrid_config
from tiny_runs import prepare_text

WANTED = {
    ("no plan", "plain"): None,
    ("middle", "plain"): FreeBitsConfig,
    ("no plan", "equilibrium"): EquilibriumObjectiveConfig,
    ("middle", "equilibrium"): HybridObjectiveConfig,
}


def test_the_settings_are_those_of_the_parts() -> None:
    for (plan, equilibrium), wanted in WANTED.items():
        assert objective_class(hybrid_config("mixed", plan, equilibrium)) is wanted
    assert objective_class(DecoderConfig) is HybridObjectiveConfig
    found = {name: objective_class(kind.config_class) for name, kind in MODELS.items() if name != "decoder"}
    assert found == {
        "transformer": None, "fem_lm": None, "mamba": None,
        "free_transformer": FreeBitsConfig, "mamba_hopfield": EquilibriumObjectiveConfig,
    }  # fmt: skip


def test_a_hybrids_loss_is_the_plans_and_the_equilibrias_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = hybrid("fem-gla", "middle", "equilibrium").train(), tokens_of(2, 13)
    config = HybridObjectiveConfig(
        kappa_bits=0.1, energy_weight=0.3, convergence_weight=0.2, stability_weight=0.4
    )
    objective = objective_of(config, seed=0)
    assert isinstance(objective, HybridObjective)
    torch.manual_seed(3)
    found = objective(model, tokens, 0)
    torch.manual_seed(3)
    alone = objective.plan(model, tokens, 0)
    assert found.bound == alone.bound == alone.terms["reconstruction"] + alone.terms["kl"]
    added = 0.3 * found.terms["energy"] + 0.2 * found.terms["convergence"] + 0.4 * found.terms["stability"]
    torch.testing.assert_close(found.loss, alone.loss + added)
    assert added > 0 and found.terms["unconverged"] == 0
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@torch.no_grad()
def test_in_evaluation_the_bound_is_the_plans_and_the_report_has_both() -> None:
    model, tokens = hybrid("mixed", "last", "equilibrium"), tokens_of(2, 13)
    objective = objective_of(HybridObjectiveConfig(), seed=0)
    torch.manual_seed(3)
    found = objective(model, tokens, 0)
    torch.manual_seed(3)
    assert found.bound == objective.plan(model, tokens, 0).bound
    report = objective.report(model, [tokens], 0)
    assert {"kl", "active_bits", "converged", "retrieval_entropy"} <= report.statistics.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize(("plan", "equilibrium"), WANTED, ids=", ".join)
def test_a_run_of_a_hybrid_trains_what_it_has(data, tmp_path, plan: str, equilibrium: str) -> None:
    settings = TrainConfig(
        output_dir=str(tmp_path / "run"),
        steps=3,
        batch_size=2,
        seq_len=16,
        warmup_steps=1,
        eval_tokens=32,
        threads=1,
    )
    model = replace(hybrid_config("fem-gla", plan, equilibrium), vocab_size=257)
    run = RunConfig(architecture="decoder", model=model, data=data, train=settings)
    assert type(run.objective) is (WANTED[plan, equilibrium] or type(None))
    before = run.model.to_dict()
    assert train(run).status == "finished"
    loaded = load_checkpoint(tmp_path / "run" / "last")
    assert type(loaded) is Decoder and loaded.config.to_dict() == before
    assert all(isinstance(block.mixer, AbstractMixer) for block in loaded.blocks)


def test_an_objective_of_other_parts_is_refused(data, tmp_path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path / "run"), steps=3, seq_len=16, warmup_steps=1)
    model = replace(hybrid_config("mixed", "middle", "equilibrium"), vocab_size=257)
    run = {"architecture": "decoder", "data": data, "train": settings}
    with pytest.raises(ValueError, match="objective must be a HybridObjectiveConfig for decoder"):
        RunConfig(model=model, objective=FreeBitsConfig(), **run)
    plain = replace(model, plan=None, equilibrium=None)
    with pytest.raises(ValueError, match="objective must be absent for decoder: .* neither a plan nor"):
        RunConfig(model=plain, objective=FreeBitsConfig(), **run)
    slots = HybridObjectiveConfig(memory_write_step=1)
    with pytest.raises(
        ValueError, match="objective.memory_write_step must be absent without writable patterns"
    ):
        RunConfig(model=model, objective=slots, **run)


@pytest.mark.learn
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("equilibrium", EQUILIBRIA)
@pytest.mark.parametrize("stack", ["fem-gla", "mixed"])
def test_a_hybrid_learns_more_than_how_frequent_tokens_are(stack: str, plan: str, equilibrium: str) -> None:
    """Each token is twice the one before, modulo 37, of which frequencies say nothing."""
    torch.manual_seed(0)
    model = Decoder(hybrid_config(stack, plan, equilibrium)).train()
    start = torch.randint(1, 37, (16, 1))
    tokens = start * torch.tensor([pow(2, t, 37) for t in range(17)]) % 37
    config = objective_class(model.config)
    objective = next_token if config is None else objective_of(config(), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    counts = torch.bincount(tokens.flatten(), minlength=37) / tokens.numel()
    entropy = torch.special.entr(counts).sum()
    for step in range(120):
        optimizer.zero_grad()
        found = objective(model, tokens, step)
        found.loss.backward()
        optimizer.step()
    assert found.bound < 0.7 * entropy
