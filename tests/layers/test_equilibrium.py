"""The equilibrium layer: starts, pads, streams, what it tells, what it refuses."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from equilibrium_cases import TIGHT, context, make_layer, run
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.sequence import sequence_layout
from helmholtz.solvers import ConvergenceError, ConvergenceWarning, SolverConfig, Status

MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
SIZES: dict[str, Any] = {"d_model": 8, "d_inner": 12, "d_head": 4}


def test_the_output_is_context_plus_what_is_read_at_the_equilibrium() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    found = run(layer, c)
    z = found.rows(found.z)
    torch.testing.assert_close(found.problem.map(z), z, rtol=1e-10, atol=1e-12)
    patterns = layer.memory.patterns()
    weights = (layer.config.beta * z @ patterns.T).softmax(-1)
    retrieved = weights @ patterns / 8**0.25
    torch.testing.assert_close(found.rows(found.retrieved), retrieved)
    read = torch.cat([z, retrieved], dim=-1) @ layer.o_proj.weight.T
    torch.testing.assert_close(found.output, c + read.view(2, 5, 8))
    torch.testing.assert_close(found.weights(), weights)


def test_pads_come_out_as_zero_and_change_nothing() -> None:
    layer = make_layer()
    c = context(2, 5, 8) * MASK.unsqueeze(-1)
    found = run(layer, c, MASK)
    for name in ("output", "z", "z_init", "retrieved"):
        assert not getattr(found, name)[~MASK].any()
        for row, real in enumerate(MASK):
            alone = run(layer, c[row : row + 1, real])
            torch.testing.assert_close(getattr(found, name)[row, real], getattr(alone, name)[0])
    assert found.converged.all() and (found.status[~MASK] == Status.CONVERGED).all()
    assert not found.num_steps[~MASK].any() and found.num_steps[MASK].all()
    assert found.rows(found.z).shape == (7, 8)
    assert torch.equal(found.scatter(found.rows(found.z)), found.z)
    assert torch.equal(found.scatter(torch.ones(7), pad=-1) == 1, MASK)
    assert (found.scatter(torch.ones(7), pad=-1)[~MASK] == -1).all()


def test_a_call_of_pads_alone() -> None:
    layer = make_layer()
    c = torch.zeros(2, 3, 8, dtype=torch.float64, requires_grad=True)
    found = run(layer, c, torch.zeros(2, 3, dtype=torch.bool))
    assert not found.output.any() and found.converged.all()
    found.output.sum().backward()
    assert c.grad.isfinite().all()


def test_what_the_layer_tells_of_a_solution() -> None:
    layer, c = make_layer(n_patterns=6), context(2, 5, 8) * MASK.unsqueeze(-1)
    found = run(layer, c, MASK)
    z = found.rows(found.z)
    torch.testing.assert_close(sum(found.components()), found.problem.energy(z))
    torch.testing.assert_close(found.energy[MASK], found.problem.energy(z))
    assert (found.residual <= 1e-13).all()
    p = found.weights()
    torch.testing.assert_close(found.entropy()[MASK], -(p * p.log()).sum(-1))
    assert torch.equal(found.top_pattern()[MASK], p.argmax(-1))
    assert not found.top_pattern()[~MASK].any() and not found.entropy()[~MASK].any()
    torch.testing.assert_close(found.usage(), p.mean(0))
    assert found.usage().sum().item() == pytest.approx(1)
    assert 0 < found.certificate() < 0.9


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_given_start_is_where_the_iteration_starts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, c = make_layer(), context(2, 5, 8)
    z_init = torch.randn(shape, dtype=dtype)
    found = run(layer, c, z_init=z_init)
    expected = z_init.double() if len(shape) == 3 else z_init.double()[:, None].expand(2, 5, 8)
    assert torch.equal(found.z_init, expected)
    assert torch.equal(found.solution.start, expected.flatten(0, 1))
    torch.testing.assert_close(found.z, run(layer, c).z)
    layer.solver = replace(TIGHT, max_steps=1, mode="picard", on_nonconvergence="ignore")
    assert not torch.equal(run(layer, c, z_init=z_init).z, run(layer, c).z)


def test_the_start_selects_the_attractor_where_there_are_several() -> None:
    layer, c = make_layer(stability="descent"), torch.zeros(1, 3, 8, dtype=torch.float64)
    ends = [
        run(layer, c, z_init=s * layer.memory.patterns()[:1].detach().expand(3, 8)[None]).z for s in (1, -1)
    ]
    assert (ends[0] - ends[1]).norm(dim=-1).min() > 1


BAD_STARTS = {
    "batch": ((3, 5, 8), r"z_init: wanted shape \(2, 5, 8\) or \(2, 8\), got \(3, 5, 8\)"),
    "time": ((2, 4, 8), r"\(2, 5, 8\) or \(2, 8\), got \(2, 4, 8\)"),
    "width": ((2, 7), r"\(2, 5, 8\) or \(2, 8\), got \(2, 7\)"),
    "rank": ((8,), r"\(2, 5, 8\) or \(2, 8\), got \(8,\)"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_of_another_shape_is_refused(case: str) -> None:
    shape, message = BAD_STARTS[case]
    with pytest.raises(ValueError, match=message):
        run(make_layer(), context(2, 5, 8), z_init=torch.zeros(shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_start_that_is_not_finite_is_refused_unless_at_a_pad(value: float) -> None:
    layer, c = make_layer(), context(2, 5, 8) * MASK.unsqueeze(-1)
    start = torch.zeros(2, 5, 8)
    start[0, 0, 3] = value
    with pytest.raises(ValueError, match="z_init must be finite"):
        run(layer, c, z_init=start)
    assert run(layer, c, MASK, z_init=start).output.isfinite().all()
    with pytest.raises(ValueError, match="z_init must be of a floating-point dtype"):
        run(layer, c, z_init=torch.zeros(2, 8, dtype=torch.long))


def test_a_context_that_is_not_finite_is_refused() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    c[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="the context must be finite at every real token"):
        run(layer, c)


@pytest.mark.parametrize("stability", ["contractive", "descent"])
@torch.no_grad()
def test_a_stream_cut_anywhere_equals_the_whole(stability: str) -> None:
    layer, c = make_layer(stability=stability), context(2, 9, 8)
    whole = run(layer, c)
    for cut in range(1, 9):
        state, parts = layer.init_state(2), []
        for part in (c[:, :cut], c[:, cut:]):
            found, state = layer(part, sequence_layout(part), state=state)
            parts.append(found)
        for name in ("output", "z", "energy"):
            joined = torch.cat([getattr(x, name) for x in parts], dim=1)
            torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-9, atol=1e-10)


def test_another_solver_can_be_assigned_and_nothing_else() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    layer.solver = SolverConfig(max_steps=1, rtol=1e-12, on_nonconvergence="raise")
    with pytest.raises(ConvergenceError):
        run(layer, c)
    layer.solver = replace(layer.solver, on_nonconvergence="warn")
    with pytest.warns(ConvergenceWarning):
        found = run(layer, c)
    assert (found.status == Status.MAX_STEPS).all()
    layer.solver = replace(layer.solver, on_nonconvergence="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(layer, c)
    assert layer.config.solver == TIGHT
    with pytest.raises((ValueError, TypeError), match="solver"):  # the latter where types are checked
        layer.solver = {"max_steps": 3}


def test_inference_mode_gives_the_same() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    expected = run(layer, c)
    with torch.inference_mode():
        found = run(layer, c)
        assert found.certificate() == pytest.approx(expected.certificate(), rel=1e-12)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_an_observer_sees_every_solution() -> None:
    layer, c, seen = make_layer(), context(2, 5, 8), []
    layer.observer = seen.append
    found = [run(layer, c), run(layer, c, MASK)]
    assert [a is b.solution for a, b in zip(seen, found, strict=True)] == [True, True]
    assert found[0].context is c


@torch.no_grad()
def test_a_row_stopped_early_keeps_what_it_has_reached() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    layer.solver = SolverConfig(mode="picard", max_steps=3, rtol=1e-12, on_nonconvergence="ignore")
    found = run(layer, c)
    z = found.rows(found.z_init)
    for _ in range(3):
        z = found.problem.map(z)
    torch.testing.assert_close(found.rows(found.z), z, rtol=0.3, atol=0.3)
    assert not found.converged.any() and found.output.isfinite().all()


@torch.no_grad()
def test_autocast_narrows_nothing_inside_the_solver() -> None:
    layer, c = make_layer().float(), context(2, 40, 8).float()
    layer.solver = SolverConfig(rtol=1e-5, energy_rtol=1e-5)
    expected = run(layer, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(layer, c)
    assert found.z.dtype == torch.float32 and found.converged.all() and (found.residual < 1e-5).all()
    error = (found.output - expected.output).norm() / expected.output.norm()
    assert error < 2e-2
    narrow = copy.deepcopy(layer).bfloat16()
    found = run(narrow, c.bfloat16())
    assert found.output.dtype == torch.bfloat16 and found.z.dtype == torch.float32
    assert (found.output.float() - expected.output).norm() < 2e-2 * expected.output.norm()


BAD_CONFIGS = {
    "d_head": ({"d_head": 5}, "d_head must divide d_inner"),
    "n_patterns": ({"n_patterns": 0}, "n_patterns must be an integer of at least 1, got 0"),
    "n_slots": ({"n_slots": -1}, "n_slots must be an integer of at least 0, got -1"),
    "beta": ({"beta": 0.0}, "beta must be a finite number above 0"),
    "novelty": ({"novelty": 1.5}, r"novelty must be in \(0, 1\], got 1.5"),
    "stability": ({"stability": "contract"}, "stability must be one of .*did you mean 'contractive'"),
    "adjoint": ({"adjoint": "implicitly"}, "adjoint must be one of .*did you mean 'implicit'"),
    "adjoint_steps": ({"adjoint_steps": 0}, "adjoint_steps must be an integer of at least 1, got 0"),
    "adjoint_on_nonconvergence": (
        {"adjoint_on_nonconvergence": "warm"},
        "adjoint_on_nonconvergence must be one of .*did you mean 'warn'",
    ),
    "policy": ({"slot_policy": "lifo"}, "slot_policy must be one of .*did you mean 'fifo'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_name(case: str) -> None:
    fields, message = BAD_CONFIGS[case]
    config = EquilibriumConfig(**SIZES)
    for name, value in fields.items():  # past the type checks, which know the words too
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_a_saddle_ends_the_backward_pass_only_where_none_is_expected() -> None:
    for stability, default in (("contractive", "raise"), ("descent", "warn")):
        config = EquilibriumConfig(**SIZES, stability=stability)
        assert config.adjoint_on_nonconvergence == default
        chosen = EquilibriumConfig(**SIZES, stability=stability, adjoint_on_nonconvergence="ignore")
        assert chosen.adjoint_on_nonconvergence == "ignore"


def test_steps_of_the_adjoint_are_filled_in() -> None:
    for name, steps in (("implicit", 50), ("phantom", 5), ("unrolled", 30)):
        assert EquilibriumConfig(**SIZES, adjoint=name).adjoint_steps == steps
