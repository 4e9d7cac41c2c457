"""Every Python block of the original Mamba-Hopfield-DEQ README, verbatim, with the names it leaves to its reader."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from helmholtz.interop.seeds import unified as seed

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "MAMBA_HOPFIELD_README"

pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason="names no README of the original")


class Bytes:
    """The tokenizer that the README has and does not define."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: torch.Tensor) -> str:
        return bytes(ids.tolist()).decode(errors="replace")


def small(**sizes: int) -> seed.UnifiedMambaHopfieldDEQ:
    torch.manual_seed(0)
    chosen = dict(vocab_size=256, d_model=32, d_state=8, n_layers=2, memory_size=48) | sizes
    return seed.UnifiedMambaHopfieldDEQ(**chosen)


def blocks() -> list[str]:
    page = Path(os.environ[VARIABLE]).read_text()
    found = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(found) == 11
    return found


@pytest.fixture(autouse=True)
def original_imports(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "compat")
    monkeypatch.chdir(tmp_path)


def run(index: int, **names) -> dict:
    names = {"torch": torch} | names
    exec(compile(blocks()[index], f"README block {index}", "exec"), names)
    return names


@pytest.mark.slow
def test_basic_usage(capsys):
    names = run(0)
    assert names["logits"].shape == (2, 128, 10000)
    printed = capsys.readouterr().out
    assert "Converged: True" in printed
    assert re.search(r"Iterations: \d+\n", printed) and re.search(r"Final energy: -?\d+\.\d{4}\n", printed)


@pytest.mark.slow
def test_training():
    model, batches = small(), list(torch.randint(0, 256, (2, 4, 17)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = run(1, model=model, train_loader=batches, val_loader=batches[:1])
    assert names["trainer"].step == 20
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved


@pytest.mark.slow
def test_generation(capsys):
    names = run(2, model=small().eval(), tokenizer=Bytes())
    assert names["generated"].shape == (1, 100)
    assert bytes(names["generated"][0, :16].tolist()) == b"Once upon a time"
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.slow
def test_validation():
    results = run(3, model=small())["results"]
    assert results["summary"]["all_tests_passed"], results["summary"]["failed"]


@pytest.mark.slow
def test_landscape(tmp_path):
    model = small()
    _, diagnostics = model(torch.randint(0, 256, (1, 12)), return_diagnostics=True)
    run(4, model=model, z_equilibrium=diagnostics["z_equilibrium"], context=diagnostics["context"])
    pictures = {file.name for file in (tmp_path / "results" / "landscape").iterdir()}
    assert pictures == {"slice.png", "trajectories.png", "basins.png"}


@pytest.mark.slow
def test_associative_recall():
    accuracies = run(5, model=small())["accuracies"]
    assert all(0 <= value <= 1 for row in accuracies.values() for value in row.values())
    assert accuracies[16][0.0] == 1.0


@pytest.mark.slow
def test_continual_learning():
    history = run(6, model=small(d_model=16, n_layers=1, memory_size=8))["history"]
    assert len(history) == 5
    assert history[-1]["accuracies"][-1] > 0.9


def test_the_configuration_builds_a_model():
    config = run(7)["config"]
    sizes = config | {"d_model": 32, "d_state": 8, "n_layers": 1, "memory_size": 32}
    model = seed.UnifiedMambaHopfieldDEQ.from_config(sizes, vocab_size=11)
    assert (model.config.d_conv, model.solver.max_iter, model.solver.solver_type) == (4, 30, "alternating")
    assert (model.config.beta, model.solver.tol_fixedpoint, model.solver.tol_energy) == (2.0, 1e-3, 1e-3)
    data = list(torch.randint(0, 11, (70, 9)))
    trainer = seed.UnifiedModelTrainer.from_config(config, model, data)
    assert len(next(iter(trainer.train_loader))) == config["batch_size"]
    assert trainer.optimizer.param_groups[0]["lr"] == config["learning_rate"]
    assert trainer.gradient_clip == config["gradient_clip"]


def test_memory_efficiency():
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates torch.cuda.amp and has no CUDA here
        names = run(8, model=model, input_ids=torch.randint(0, 256, (2, 12)))
    assert names["logits"].isfinite().all()
    assert model.solver.max_iter == 10
    assert model.dynamics.mamba.gradient_checkpointing


def test_warm_start():
    batch = torch.randint(0, 256, (2, 12))
    names = run(9, model=small(), dataloader=[batch, batch])
    info = names["diagnostics"]["solver_info"]
    assert info["converged"] and info["iterations"] <= 2
    assert names["previous_z"].shape == (2, 12, 32)


def test_stability_options():
    model = small()
    names = run(10, model=model, UnifiedTrainingObjective=seed.UnifiedTrainingObjective)
    groups = names["optimizer"].param_groups
    assert [len(group["params"]) for group in groups][1] == 1 and groups[1]["lr"] == 1e-5
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    loss, metrics = names["objective"].compute_loss(model, torch.randint(0, 256, (2, 9)))
    loss.backward()
    assert metrics["stability"] == 0, "a new model is far within 0.8"
