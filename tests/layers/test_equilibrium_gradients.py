"""Gradients of equilibria: exact, in constant memory, in evaluation mode as in training."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from equilibrium_cases import TIGHT, context, make_layer, run
from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.layers.equilibrium_config import AdjointName
from helmholtz.solvers import ConvergenceError, ConvergenceWarning, Implicit, Phantom, Unrolled

MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)


EXACT = Implicit(rtol=1e-13, on_nonconvergence="ignore")


def exact(layer: EquilibriumLayer) -> EquilibriumLayer:
    """With the implicit gradient as far as float64 goes."""
    layer.adjoint = EXACT
    return layer


def gradients(
    layer: EquilibriumLayer, c: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, **given: Tensor
) -> dict[str, Tensor]:
    """Gradients of random sums of output, equilibrium and what was retrieved, by input and all parameters."""
    c = c.clone().requires_grad_()
    found = run(layer, c, mask, **given)
    g = torch.Generator().manual_seed(0)
    loss = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum()
        for x in (found.output, found.z, found.retrieved)
    )
    named = {"c": c, **dict(layer.named_parameters())}
    named.pop("dynamics.start_proj.weight")  # where the iteration starts does not matter
    return dict(zip(named, torch.autograd.grad(scale * loss, list(named.values())), strict=True))


@pytest.mark.parametrize("stability", ["contractive", "descent"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "pads"])
def test_the_implicit_gradient_is_that_of_a_long_unroll(stability: str, mask: Tensor | None) -> None:
    c = context(2, 5, 8)
    if mask is not None:
        c = c * mask.unsqueeze(-1)
    layer = exact(make_layer(stability=stability))
    z = run(layer, c, mask).z.detach()  # from here, as several attractors may be within reach
    implicit = gradients(layer, c, mask)
    layer.adjoint = Unrolled(n_steps=200)
    unrolled = gradients(layer, c, mask, z_init=z)
    assert implicit.keys() == unrolled.keys()
    for name, expected in unrolled.items():
        assert expected.any(), name
        error = (implicit[name] - expected).norm() / expected.norm()
        assert error < 1e-6, f"{name}: {error:.3g}"


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_gradient_is_linear_in_the_scale_of_the_loss(scale: float) -> None:
    layer, c = make_layer(), context(2, 5, 8)
    expected, found = gradients(layer, c), gradients(layer, c, scale=scale)
    for name, value in found.items():
        torch.testing.assert_close(value / scale, expected[name], rtol=1e-9, atol=1e-12)


def test_phantom_gradients_come_closer_with_each_step() -> None:
    c = context(2, 5, 8)
    expected, errors = gradients(exact(make_layer()), c)["c"], []
    for steps in (1, 3, 9, 27):
        found = gradients(make_layer(adjoint="phantom", adjoint_steps=steps), c)["c"]
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert all(after < before / 5 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] > 1e-2 and errors[-1] < 1e-6


@pytest.mark.parametrize("stability", ["contractive", "descent"])
def test_gradcheck_by_context_and_parameters(stability: str) -> None:
    layer = make_layer(d_model=6, d_inner=6, d_state=3, d_head=3, n_patterns=5, stability=stability)
    leaves = {name: p for name, p in layer.named_parameters() if "start_proj" not in name}

    def call(c: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, values, strict=True))
        names = torch.func.functional_call(_Call(layer), {f"layer.{k}": v for k, v in given.items()}, (c,))
        return names

    c = context(1, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(call, (c, *leaves.values()), eps=1e-6, atol=1e-6, fast_mode=True)


class _Call(torch.nn.Module):
    def __init__(self, layer: EquilibriumLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        found = run(self.layer, c)
        return found.output, found.retrieved


def test_evaluation_mode_changes_neither_values_nor_gradients() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    training = gradients(layer.train(), c)
    evaluating = gradients(layer.eval(), c)
    assert all(torch.equal(evaluating[name], value) for name, value in training.items())
    with torch.no_grad():
        silent = run(layer, c)
    assert torch.equal(silent.output, run(layer, c).output) and not silent.output.requires_grad


def test_a_frozen_input_leaves_the_parameters_their_gradients() -> None:
    layer = make_layer()
    run(layer, context(2, 5, 8)).output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        if "start_proj" not in name:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_start_learns_from_its_distance_to_the_equilibrium() -> None:
    layer = make_layer()
    found = run(layer, context(2, 5, 8))
    (found.z_init - found.z.detach()).square().sum().backward()
    assert layer.dynamics.start_proj.weight.grad.any()
    assert layer.memory.memory_patterns.grad is None or not layer.memory.memory_patterns.grad.any()


def by_direction(
    layer: EquilibriumLayer, value: Callable[..., Tensor], inputs: dict[str, Tensor], *, eps: float = 1e-6
) -> None:
    """The gradient of ``value(**inputs)`` by the inputs and all parameters, along a random direction of them all."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    named = [*leaves.values(), *layer.parameters()]
    gradients = torch.autograd.grad(value(**leaves), named, materialize_grads=True)
    generator, ends = torch.Generator().manual_seed(3), []
    along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in named]
    for step in (eps, -2 * eps):
        with torch.no_grad():
            for x, v in zip(named, along, strict=True):
                x += step * v
            ends.append(value(**leaves))
    actual = sum((g * v).sum() for g, v in zip(gradients, along, strict=True))
    torch.testing.assert_close(actual, (ends[0] - ends[1]) / (2 * eps), rtol=1e-6, atol=1e-7)


ADJOINTS = {"implicit": EXACT, "phantom": Phantom(n_steps=60), "unrolled": Unrolled(n_steps=3)}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("stability", ["contractive", "descent"])
def test_the_energy_is_differentiable(stability: str, adjoint: str) -> None:
    layer, c = make_layer(strong=False, stability=stability), context(2, 5, 8) * MASK.unsqueeze(-1)
    layer.adjoint, weights = ADJOINTS[adjoint], context(2, 5, 1, seed=7).squeeze(-1)
    by_direction(layer, lambda c: (run(layer, c, MASK).energy * weights).sum(), {"c": c})


@pytest.mark.parametrize("adjoint", get_args(AdjointName))
def test_a_term_of_the_energy_moves_the_parameters(adjoint: str) -> None:
    layer, c = make_layer(adjoint=adjoint), context(2, 5, 8)
    layer.requires_grad_()
    grads = []
    for weight in (0, 1000):
        found = run(layer, c)
        loss = found.output.square().sum() + weight * found.energy.mean()
        grads.append(torch.autograd.grad(loss, [layer.dynamics.u_proj.weight, layer.memory.memory_patterns]))
    for without, with_term in zip(*grads, strict=True):
        assert (with_term - without).norm() > without.norm()


def test_the_residual_is_differentiable_along_an_unrolled_iteration() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    layer.adjoint = Unrolled(n_steps=2)
    by_direction(layer, lambda c: run(layer, c, MASK).residual.sum(), {"c": c * MASK.unsqueeze(-1)})


def test_the_residual_of_an_implicit_equilibrium_has_gradient_0() -> None:
    layer, c = exact(make_layer()), context(2, 5, 8)
    layer.solver = replace(TIGHT, rtol=1e-8)
    found = run(layer, c)
    assert found.residual.max() > 1e-12  # there is something to differentiate
    gradient = torch.autograd.grad(found.residual.sum(), layer.dynamics.u_proj.weight)[0]
    assert (
        gradient.norm()
        < 1e-4 * torch.autograd.grad(run(layer, c).z.norm(), layer.dynamics.u_proj.weight)[0].norm()
    )


@pytest.mark.parametrize("given", [True, False], ids=["z_init", "start_proj"])
def test_an_unrolled_iteration_is_differentiated_back_to_its_start(given: bool) -> None:
    layer, c = make_layer(), context(2, 5, 8)
    layer.adjoint = Unrolled(n_steps=2)
    inputs = {"c": c, "z_init": context(2, 5, 8, seed=5)} if given else {"c": c}
    by_direction(layer, lambda c, **start: run(layer, c, MASK, **start).output.sin().sum(), inputs)
    found = run(layer, c)
    (moved,) = torch.autograd.grad(found.output.sum(), layer.dynamics.start_proj.weight)
    assert moved.norm() > 0.01


def at_a_saddle(**fields: object) -> tuple[EquilibriumLayer, Tensor]:
    """Two opposite patterns pull from 0 in opposite directions: the equilibrium there is a saddle."""
    layer = make_layer(stability="descent", n_patterns=2, **fields)
    with torch.no_grad():
        layer.memory.memory_patterns[1] = -layer.memory.memory_patterns[0]
        layer.dynamics.log_strengths.copy_(torch.tensor([-60.0, 3.0]))
    return layer, torch.zeros(2, 3, 8, dtype=torch.float64)


def test_a_saddle_is_counted_once_per_backward_pass_in_the_descent_regime() -> None:
    layer, c = at_a_saddle()
    for _ in range(2):
        found = run(layer, c.requires_grad_(), z_init=torch.zeros_like(c))
        assert found.converged.all()
        with pytest.warns(
            ConvergenceWarning, match="not solved for 6 of 6 rows, 6 of them at a saddle"
        ) as caught:
            found.output.sum().backward()
        assert len(caught) == 1
    assert c.grad is not None and c.grad.isfinite().all()


def test_a_saddle_raises_where_that_is_asked_for() -> None:
    layer, c = at_a_saddle(adjoint_on_nonconvergence="raise")
    found = run(layer, c.requires_grad_(), z_init=torch.zeros_like(c))
    with pytest.raises(ConvergenceError, match="6 of them at a saddle"):
        found.output.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    layer, c = make_layer(), context(1, 3, 8).requires_grad_()
    (slope,) = torch.autograd.grad(run(layer, c).z.square().sum(), c, create_graph=True)
    with pytest.raises(
        RuntimeError,
        match="no second derivative|is differentiable once|derivative for helmholtz::.* is not implemented",
    ):
        torch.autograd.grad(slope.square().sum(), c)


def saved_bytes(call: Callable[[], object]) -> int:
    sizes = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.nbytes)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        kept = call()
    assert kept is not None
    return sum(sizes)


@pytest.mark.parametrize("adjoint", ["implicit", "phantom"])
def test_what_is_kept_for_the_gradient_does_not_grow_with_the_iterations(adjoint: str) -> None:
    layer, c = make_layer(adjoint=adjoint), context(2, 20, 8).requires_grad_()
    sizes = {}
    for steps in (4, 200):
        layer.solver = replace(TIGHT, max_steps=steps, mode="picard", rtol=1e-300, on_nonconvergence="ignore")
        sizes[steps] = saved_bytes(lambda: run(layer, c))
        taken = run(layer, c).num_steps.max()
        assert taken == 4 if steps == 4 else taken > 8
    assert sizes[4] == sizes[200] > 0
