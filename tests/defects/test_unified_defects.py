"""The faults measured in public code of the Mamba-Hopfield equilibrium model, by number: none of them may come back.

Each test fails when the described behaviour is put into this library. What the README
asks for and the code lacked (11) is in ``tests/interop/test_seed_unified*.py``, weak validators (12) and
landscapes (13) in ``tests/evals``.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from helmholtz.experiments.recall.data import IGNORED, PairTask, sample_pairs
from helmholtz.interop.seeds.unified import UnifiedMambaHopfieldDEQ
from helmholtz.layers.equilibrium_reading import retrieval_energy
from helmholtz.ops.losses import cross_entropy
from helmholtz.solvers import ConvergenceWarning

MODES = ("alternating", "simultaneous", "cascade")
ROUNDED = {"rtol": 1e-9, "atol": 1e-9}
"""In float64, where no decision of a solver comes near its limit."""


def model_of(mode: str = "alternating", **options) -> UnifiedMambaHopfieldDEQ:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_state=4, n_layers=2, memory_size=24)
    return UnifiedMambaHopfieldDEQ(**sizes | {"solver_type": mode} | options)


def ids_of(rows: int = 2, time: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(40, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
def test_defect_01_everything_converges(mode):
    _, found = model_of(mode)(ids_of(), return_diagnostics=True)
    info = found["solver_info"]
    assert info["converged"] and info["final_fp_residual"] <= 1e-3 and info["iterations"] < 30


def test_defect_02_plain_iteration_settles():
    model = model_of(stability="descent")
    model.model.solver = replace(model.model.solver, mode="picard", max_steps=1000, rtol=1e-5)
    _, found = model(ids_of(), return_diagnostics=True)
    assert found["solver_info"]["converged"]
    assert found["z_equilibrium"].abs().max() < 100


@pytest.mark.parametrize("mode", MODES)
def test_defect_03_every_mode_runs_under_gradients_and_leaves_no_gradient_behind(mode):
    model = model_of(mode)
    logits = model(ids_of())
    assert all(parameter.grad is None for parameter in model.parameters())
    logits.sum().backward()


@pytest.mark.parametrize(
    ("mode", "stability"),
    [*((mode, "contractive") for mode in MODES), ("alternating", "descent"), ("simultaneous", "descent")],
)
def test_defect_04_the_loss_reaches_the_dynamics(mode, stability):
    model, ids = model_of(mode, stability=stability), ids_of()
    logits, found = model(ids, return_diagnostics=True)
    assert found["z_equilibrium"].requires_grad
    cross_entropy(logits[:, :-1], ids[:, 1:]).backward()
    start = "start_proj"  # where the iteration begins does not move where it ends
    reached = {name: p.grad for name, p in model.dynamics.named_parameters() if start not in name}
    assert reached and all(grad is not None and grad.abs().max() > 0 for grad in reached.values())


def test_defect_04_a_saddle_is_never_differentiated_in_silence():
    """Among several equilibria ``cascade`` may settle on one that no neighbour comes to: there is no gradient."""
    logits = model_of("cascade", stability="descent")(ids_of())
    with pytest.warns(ConvergenceWarning, match=r"\d+ of them at a saddle, where there is no gradient"):
        logits.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("max_iterations", [1, 30])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::helmholtz.solvers.ConvergenceWarning")
def test_defect_05_the_last_token_changes_nothing_before_it(mode, max_iterations):
    model, ids = model_of(mode, max_iterations=max_iterations).eval().double(), ids_of()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 40
    torch.testing.assert_close(model(ids)[:, :-1], model(changed)[:, :-1], **ROUNDED)
    assert not torch.equal(model(ids)[:, -1], model(changed)[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_defect_06_a_row_does_not_depend_on_its_neighbours(mode):
    model, ids = model_of(mode).eval().double(), ids_of()
    other = torch.cat([ids[:1], ids_of(1, seed=2)])
    torch.testing.assert_close(model(ids)[0], model(other)[0], **ROUNDED)
    torch.testing.assert_close(model(ids)[:1], model(ids[:1]), **ROUNDED)
    near, far = torch.zeros(2, 2, 12, 16, dtype=torch.float64)
    far[1] = 30.0  # takes longer to come to rest
    torch.testing.assert_close(model(ids, z_init=near)[0][0], model(ids, z_init=far)[0][0], **ROUNDED)


def test_defect_07_the_patterns_are_learned():
    model, ids = model_of(), ids_of()
    assert isinstance(model.memory_patterns, torch.nn.Parameter)
    assert [name for name, _ in model.named_parameters() if "memory" in name] == [
        "model.equilibrium.memory.memory_patterns"
    ]
    cross_entropy(model(ids), ids).backward()
    assert model.memory_patterns.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_defect_08_looking_and_generating_write_nothing(training):
    model = model_of(n_slots=5).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, found = model(ids_of(), return_diagnostics=True)
    model.generate(ids_of(1, 4), max_length=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if training:
        assert model.update_memory(found["z_equilibrium"]) > 0
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    else:
        with pytest.raises(ValueError, match="eval"):
            model.update_memory(found["z_equilibrium"])


def test_defect_09_the_energy_that_is_minimised_is_bounded():
    """Larger and larger patterns and states made the original's fall without end."""
    model = model_of()
    for scale in (1.0, 1e3):
        with torch.no_grad():
            model.memory_patterns.mul_(scale)
        found = model.model(ids_of()).equilibrium
        energy = retrieval_energy(model.model.equilibrium, found)
        assert energy.min() >= 0 and energy.max() <= 2 * model.model.memory.radius**2 + 1e-4


def test_defect_10_recall_can_be_solved():
    """Each key stays beside its value, the query is one of the keys, and only the answer is asked for."""
    tokens, targets = sample_pairs(PairTask(), 50, generator=torch.Generator().manual_seed(0))
    assert (targets[:, :-1] == IGNORED).all()
    for row, answer in zip(tokens.tolist(), targets[:, -1].tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4 and pairs[row[8]] == answer


def test_defect_14_no_heavy_packages_are_needed():
    code = "import sys, helmholtz.interop.seeds.unified; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("jax", "mamba_ssm", "wandb", "plotly", "seaborn", "networkx", "transformers", "matplotlib"):
        assert f"'{name}'" not in loaded


def test_defect_15_a_call_leaves_nothing_behind_in_the_model():
    model = model_of()

    def attributes():
        return {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if not key.startswith("_")
        }

    before = attributes()
    model(ids_of(), return_diagnostics=True)
    after = attributes()
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
