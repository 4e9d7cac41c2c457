"""The equilibrium model: causality, streams, memory, names, and what its config refuses."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decoder_cases import tokens_of
from equilibrium_cases import MODES, make_model
from helmholtz.layers import dynamics
from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig, medium, small
from helmholtz.ops.losses import cross_entropy
from helmholtz.solvers import SolverConfig

SIZES: dict[str, Any] = {"vocab_size": 37, "d_model": 16, "d_head": 8, "n_layers": 1, "n_patterns": 5}
STREAMS = {"contractive": make_model(), "descent": make_model(stability="descent")}
"""Never changed but for their solver, which is put back."""


def everything(found: Equilibrium) -> list[Tensor]:
    names = ("z", "z_init", "retrieved", "output", "energy", "residual", "num_steps", "status")
    return [getattr(found, name) for name in names]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stability", STREAMS)
@pytest.mark.parametrize("max_steps", [1, 3, 30])
@torch.no_grad()
def test_neither_future_nor_neighbours_matter(mode: str, stability: str, max_steps: int) -> None:
    """To logits, equilibria, energies, residuals and step counts, even of rows that are stopped unconverged.

    But for float64's rounding: rows that leave the solver earlier put the others elsewhere in its products.
    """
    model = copy.deepcopy(STREAMS[stability]).double()
    model.solver = SolverConfig(mode=mode, max_steps=max_steps, rtol=1e-5, on_nonconvergence="ignore")
    tokens, other = tokens_of(3, 50), tokens_of(3, 50, seed=1)
    before = model(tokens)
    for border in (1, 17, 49):
        changed = other.clone()
        changed[1, :border] = tokens[1, :border]
        after = model(changed)
        past = (slice(1, 2), slice(0, border))
        torch.testing.assert_close(before.logits[past], after.logits[past], rtol=1e-9, atol=1e-9)
        for a, e in zip(everything(after.equilibrium), everything(before.equilibrium), strict=True):
            torch.testing.assert_close(a[past], e[past], rtol=1e-9, atol=1e-9)
    assert (before.logits[1, border:] - after.logits[1, border:]).abs().max() > 0.01


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "unrolled"])
@pytest.mark.parametrize("max_steps", [1, 30])
def test_the_future_has_no_gradient(adjoint: str, max_steps: int) -> None:
    model = make_model(adjoint=adjoint)
    model.solver = replace(model.solver, max_steps=max_steps, on_nonconvergence="ignore")
    seen = []
    model.embed.register_forward_hook(lambda *call: seen.append(call[-1]) or call[-1].retain_grad())
    model(tokens_of(2, 20)).logits[0, 7].square().sum().backward()
    slope = seen[0].grad
    assert not slope[0, 8:].any() and not slope[1].any()
    assert (slope[0, :8] != 0).any(-1).all()


@pytest.mark.parametrize("stability", STREAMS)
@torch.no_grad()
def test_a_batch_of_two_equals_its_rows(stability: str) -> None:
    model, tokens = STREAMS[stability], tokens_of(2, 30)
    both = model(tokens).logits
    for row in range(2):
        alone = model(tokens[row : row + 1]).logits[0]
        assert (alone - both[row]).abs().max() <= 1e-5 * both.abs().max()


@pytest.mark.parametrize("stability", STREAMS)
@pytest.mark.parametrize("prompt", [1, 11])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole_pass(stability: str, prompt: int) -> None:
    model = make_model(stability=stability).double()
    tokens = tokens_of(2, 24)
    whole = model(tokens)
    output = model.step(tokens[:, :prompt], model.init_state(2))
    parts = [output]
    for t in range(prompt, 24):
        output = model.step(tokens[:, t : t + 1], output.state)
        parts.append(output)
    logits = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-9)
    steps = torch.cat([part.equilibrium.num_steps for part in parts], dim=1)
    assert torch.equal(steps, whole.equilibrium.num_steps)


@torch.no_grad()
def test_a_stream_may_start_warm() -> None:
    """At the predecessor's equilibrium: the same logits within the tolerance, from another start."""
    model, tokens, kept = STREAMS["contractive"], tokens_of(2, 12), STREAMS["contractive"].solver
    model.solver = SolverConfig(max_steps=100, rtol=2e-6, energy_rtol=1e-6)
    out = model.step(tokens[:, :6], model.init_state(2))
    for t in range(6, 12):
        cold = model.step(tokens[:, t : t + 1], out.state)
        warm = model.step(tokens[:, t : t + 1], out.state, z_init=out.equilibrium.z[:, -1])
        assert torch.equal(warm.equilibrium.z_init[:, 0], out.equilibrium.z[:, -1])
        torch.testing.assert_close(warm.logits, cold.logits, rtol=0, atol=1e-5)
        out = warm
    model.solver = kept
    with pytest.raises(ValueError, match="z_init"):
        model.step(tokens[:, :1], out.state, z_init=torch.zeros(3, 16))


def test_generation_is_greedy_on_the_whole_pass() -> None:
    model, settings = STREAMS["contractive"], SamplingSettings(max_new_tokens=8, temperature=0)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    rows = generate(model, prompts, settings)
    for prompt, row in zip(prompts, rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == row


@torch.no_grad()
def test_a_start_changes_the_contractive_model_within_the_tolerance_only() -> None:
    model, tokens = STREAMS["contractive"], tokens_of(2, 30)
    cold = model(tokens)
    previous = model(tokens_of(2, 30, seed=1)).equilibrium.z
    for z_init in (previous, previous[:, -1], cold.equilibrium.z):
        warm = model(tokens, z_init=z_init)
        assert warm.equilibrium.converged.all()
        assert (warm.logits - cold.logits).abs().max() < 2e-2 * cold.logits.abs().max()
    with pytest.raises(
        ValueError, match=r"z_init: wanted shape \(2, 30, 16\) or \(2, 16\), got \(3, 30, 16\)"
    ):
        model(tokens, z_init=torch.zeros(3, 30, 16))


def test_only_one_name_holds_memory_and_the_original_split_covers_everything() -> None:
    for fields in ({}, {"stability": "descent"}, {"n_slots": 4}):
        model = make_model(**fields)
        names = [name for name, _ in model.named_parameters() if "memory" in name]
        assert names == ["equilibrium.memory.memory_patterns"]
        assert isinstance(model.memory_patterns, nn.Parameter)
        groups = [
            {"params": [p for n, p in model.named_parameters() if "memory" not in n]},
            {"params": [model.memory_patterns], "lr": 1e-5},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
        covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert covered == {id(p) for p in model.parameters()}
        assert all(p.ndim for p in model.parameters()), "0-dim parameters cannot be sharded"


def test_writing_stores_equilibria_in_training_mode_only() -> None:
    model = make_model(n_slots=40, novelty=1.0)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    found = model(tokens_of(2, 9), attention_mask=mask).equilibrium
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ValueError, match="in_eval must be true to write in evaluation mode"):
        model.write_memory(found)
    generate(model, [[1, 2]], SamplingSettings(max_new_tokens=3))
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
    assert model.train().write_memory(found).stored == 14
    assert int(model.memory.occupied.sum()) == 14
    directions = nn.functional.normalize(found.z[mask].detach(), dim=-1)
    stored = nn.functional.normalize(model.memory.store.rows[model.memory.occupied], dim=-1)
    assert ((directions @ stored.T).amax(-1) > 1 - 1e-5).all()
    assert not model.memory.store.rows.requires_grad
    changed = model.eval()(tokens_of(2, 9), attention_mask=mask)
    assert not torch.equal(changed.equilibrium.z, found.z)
    assert changed.equilibrium.parameters.patterns.shape == (52, 16)


def test_a_mask_chooses_what_is_written_and_evaluation_may_ask() -> None:
    model = make_model(n_slots=40, novelty=1.0)
    found = model(tokens_of(2, 9)).equilibrium
    last = torch.zeros(2, 9, dtype=torch.bool)
    last[:, -1] = True
    assert model.write_memory(found, last, in_eval=True).stored == 2
    model.solver = replace(model.solver, max_steps=1, rtol=1e-6, on_nonconvergence="ignore")
    assert model.write_memory(model(tokens_of(2, 9)).equilibrium, in_eval=True).changed == 0


def test_a_written_memory_does_not_disturb_a_gradient_under_way() -> None:
    model = make_model(n_slots=40).train()
    output = model(tokens_of(2, 9))
    expected = torch.autograd.grad(output.logits.sum(), model.memory_patterns, retain_graph=True)[0]
    model.write_memory(output.equilibrium)
    assert torch.equal(torch.autograd.grad(output.logits.sum(), model.memory_patterns)[0], expected)


def test_a_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    model = make_model(n_slots=6, novelty=1.0).train()
    model.write_memory(model(tokens_of(1, 4)).equilibrium)
    save_checkpoint(model, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a")
    assert isinstance(loaded, MambaHopfield) and loaded.config == model.config
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    tokens = tokens_of(2, 9)
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert loaded.write_memory(loaded(tokens).equilibrium, in_eval=True).stored > 0, "buffers can be written"
    narrow = load_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    assert narrow.memory.store.counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.float(),
            r"counts' is torch.float32 of shape \(6,\), the config asks for torch.int64 \(6,\)",
        ),
        (lambda x: x[:5], r"counts' is torch.int64 of shape \(5,\), the config asks for torch.int64 \(6,\)"),
    ],
    ids=["dtype", "shape"],
)
def test_a_checkpoint_whose_slots_do_not_fit_is_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    save_checkpoint(make_model(n_slots=6), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["equilibrium.memory.store.counts"] = change(tensors["equilibrium.memory.store.counts"])
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a")


def test_bfloat16_autocast_is_finite_and_near() -> None:
    model, tokens = make_model(), tokens_of(4, 40)
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens)
    assert output.logits.isfinite().all() and output.equilibrium.converged.all()
    assert output.equilibrium.z.dtype == torch.float32
    assert (output.logits.float() - expected).norm() < 2e-2 * expected.norm()
    cross_entropy(output.logits.float()[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_of_gradients_changes_none_of_them() -> None:
    model, tokens, found = make_model().double().train(), tokens_of(2, 20), []
    for enabled in (False, True, False):
        if enabled:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        mixers = [block.mixer.gradient_checkpointing for block in model.blocks]
        assert {*mixers, model.equilibrium.dynamics.mamba.gradient_checkpointing} == {enabled}
        model.zero_grad()
        cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(found[2][name], expected)


def test_the_solver_of_a_model_can_be_replaced_without_touching_its_config() -> None:
    model = make_model()
    model.solver = replace(model.solver, max_steps=7, mode="cascade")
    assert model.solver.max_steps == 7 == model.equilibrium.solver.max_steps
    assert model.config.solver == SolverConfig()
    with pytest.raises((ValueError, TypeError), match="solver"):  # the latter where types are checked
        model.solver = 10


def test_a_config_survives_json_with_its_solver() -> None:
    config = MambaHopfieldConfig(**SIZES, solver=SolverConfig(mode="cascade", rtol=1e-4), n_slots=3)
    assert MambaHopfieldConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.adjoint_steps == 50
    assert MODELS["mamba_hopfield"].config_class is MambaHopfieldConfig
    for preset in (small(100), medium(10000)):
        assert type(preset).from_dict(preset.to_dict()) == preset
    readme = medium(10000)
    assert (readme.d_model, readme.d_state, readme.n_layers, readme.n_patterns) == (512, 64, 6, 5000)


BAD_FIELDS = {
    "solver key": ({"solver": {"max_iter": 3}}, "solver has no key 'max_iter'"),
    "solver mode": ({"solver": {"mode": "alternate"}}, "mode must be one of .*did you mean 'alternating'"),
    "max_steps": ({"solver": {"max_steps": 0}}, "max_steps must be an integer of at least 1, got 0"),
    "rtol": ({"solver": {"rtol": 0.0}}, "rtol must be a finite number above 0, got 0.0"),
    "damping": ({"solver": {"damping": 2.0}}, "damping must be"),
    "stability": ({"stability": "stable"}, "stability must be one of"),
    "adjoint": ({"adjoint": "explicit"}, "adjoint must be one of"),
    "patterns": ({"n_patterns": 0}, "n_patterns must be an integer of at least 1, got 0"),
    "beta": ({"beta": -1.0}, "beta must be a finite number above 0, got -1.0"),
    "unknown": ({"memory_size": 5}, "no key 'memory_size'"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_settings_are_refused_by_name(case: str) -> None:
    fields, message = BAD_FIELDS[case]
    with pytest.raises(ValueError, match=message):
        MambaHopfieldConfig.from_dict(SIZES | fields)


def test_sequences_of_period_four_are_learnt() -> None:
    """Untrained, the loss is log 37 = 3.6."""
    torch.manual_seed(0)
    model = MambaHopfield(MambaHopfieldConfig(**SIZES | {"d_model": 32, "n_patterns": 16}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randperm(37)[:32].view(8, 4).repeat(1, 5)
    for _ in range(60):
        output = model(rows[:, :-1])
        assert output.equilibrium.converged.all()
        loss = cross_entropy(output.logits, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_the_weights_norm_is_bounded_once_per_stream_and_at_every_call_with_gradients(monkeypatch) -> None:
    model, tokens, calls = make_model(), torch.randint(37, (1, 4)), []
    bound = dynamics.spectral_norm_bound
    monkeypatch.setattr(dynamics, "spectral_norm_bound", lambda weight: calls.append(1) or bound(weight))
    for gradients, wanted in ((False, 1), (True, 4)):
        calls.clear()
        with torch.set_grad_enabled(gradients):
            state = model.init_state(1)
            for token in tokens.split(1, dim=1):
                state = model.step(token, state).state
        assert len(calls) == wanted
