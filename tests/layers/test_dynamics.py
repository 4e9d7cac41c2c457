"""From context to energy: ranges, regimes, pads, precision, and what each coefficient sees."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from equilibrium_cases import context, make_layer, run
from helmholtz.layers.dynamics import TokenDynamics
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.hopfield import HopfieldMemory
from helmholtz.layers.sequence import sequence_layout
from helmholtz.ops.token_energy import contraction_certificate

MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)


def test_fields_are_what_the_context_makes_of_them() -> None:
    layer, c = make_layer(), context(2, 5, 8)
    d = layer.dynamics
    made = d(c, sequence_layout(c), layer.memory())
    field, start = made.field, made.start
    past, gain, _ = d.mamba(c, sequence_layout(c), None)
    assert made.index is None
    torch.testing.assert_close(field.u, (c @ d.u_proj.weight.T).flatten(0, 1))
    torch.testing.assert_close(start, c @ d.start_proj.weight.T)
    torch.testing.assert_close(
        field.gate, torch.sigmoid(c @ d.gate_proj.weight.T + d.gate_proj.bias).flatten(0, 1)
    )
    assert torch.equal(field.a, past.flatten(0, 1)) and torch.equal(field.delta, gain.flatten(0, 1))
    assert (field.gate > 0).all() and (field.gate < 1).all()
    assert (field.delta > 0).all() and (field.delta < 1).all()


def test_pads_have_no_energy_and_the_others_keep_their_order() -> None:
    layer = make_layer()
    c = context(2, 5, 8) * MASK.unsqueeze(-1)
    made = layer.dynamics(c, sequence_layout(c, MASK), layer.memory())
    assert made.index is not None and made.index.tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert all(len(x) == 7 for x in made.field)
    for row, places in enumerate((slice(0, 3), slice(3, 7))):
        alone = c[row : row + 1, MASK[row]]
        expected = layer.dynamics(alone, sequence_layout(alone), layer.memory()).field
        for a, e in zip(made.field, expected, strict=True):
            torch.testing.assert_close(a[places], e)


def test_the_past_reaches_a_token_only_through_the_recurrence() -> None:
    layer, c = make_layer(), context(1, 6, 8)
    before = layer.dynamics(c, sequence_layout(c), layer.memory()).field
    other = c.clone()
    other[:, 2] += 1
    after = layer.dynamics(other, sequence_layout(c), layer.memory()).field
    for name, moved in {"u": [2], "gate": [2], "delta": [2], "a": [2, 3, 4, 5]}.items():
        changed = (getattr(before, name) != getattr(after, name)).any(-1).nonzero().squeeze(1).tolist()
        assert changed == moved, name
    assert not before.a[0].any(), "the first token has no past"


def test_a_stream_carries_the_recurrence() -> None:
    layer, c = make_layer(), context(2, 7, 8)
    whole = layer.dynamics(c, sequence_layout(c), layer.memory())
    first = layer.dynamics(c[:, :3], sequence_layout(c[:, :3]), layer.memory())
    rest = layer.dynamics(c[:, 3:], sequence_layout(c[:, 3:]), layer.memory(), first.state)
    for a, b, e in zip(first.field, rest.field, whole.field, strict=True):
        torch.testing.assert_close(
            torch.cat([a.view(2, 3, -1), b.view(2, 4, -1)], dim=1), e.view(2, 7, -1), rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(rest.state, whole.state, rtol=1e-10, atol=1e-12)


@settings(max_examples=25)
@given(
    seed=strategies.integers(0, 10**6),
    scale=strategies.sampled_from([1e-3, 1.0, 30.0]),
    beta=strategies.sampled_from([0.1, 2.0, 50.0]),
)
@torch.no_grad()
def test_the_contractive_regime_contracts_whatever_the_parameters(
    seed: int, scale: float, beta: float
) -> None:
    layer = make_layer(seed, beta=beta, n_slots=2)
    for parameter in layer.parameters():
        parameter.mul_(scale)
    layer.memory.write(torch.randn(2, 8, dtype=torch.float64))
    c = context(1, 30, 8)
    field = layer.dynamics(c, sequence_layout(c), layer.memory()).field
    parameters = layer.dynamics.energy_parameters(layer.memory())
    w_kappa, w_lambda, _ = layer.dynamics.theta.softmax(0)
    assert torch.linalg.matrix_norm(parameters.weight, 2) <= 1
    assert torch.linalg.matrix_norm(parameters.weight, 2) > 0.9
    torch.testing.assert_close(parameters.kappa, 0.9 * w_kappa.view(1))
    torch.testing.assert_close(parameters.strength, (0.9 * w_lambda / (beta * 8**0.5)).view(1))
    assert contraction_certificate(field, parameters) < 0.9 * (w_kappa + w_lambda) + 1e-12


def test_a_weight_of_zeros_is_no_division_by_zero() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.dynamics.weight.zero_()
    found = run(layer, context(1, 4, 8))
    found.output.sum().backward()
    assert found.z.isfinite().all() and layer.dynamics.weight.grad.isfinite().all()


def test_the_descent_regime_is_free() -> None:
    layer = make_layer(stability="descent")
    with torch.no_grad():
        layer.dynamics.log_strengths.copy_(torch.tensor([1.0, -2.0]))
        layer.dynamics.weight.mul_(7)
    parameters = layer.dynamics.energy_parameters(layer.memory())
    assert torch.equal(parameters.weight, layer.dynamics.weight)
    assert parameters.kappa.item() == pytest.approx(2.718281828)
    assert parameters.strength.item() == pytest.approx(0.1353352832)


@pytest.mark.parametrize("stability", ["contractive", "descent"])
def test_names_and_shapes_of_parameters(stability: str) -> None:
    layer = make_layer(stability=stability)
    names = dict(layer.named_parameters())
    assert [name for name in names if "memory" in name] == ["memory.memory_patterns"]
    assert all(parameter.ndim >= 1 for parameter in names.values())
    assert ("dynamics.theta" in names) == (stability == "contractive")
    assert ("dynamics.log_strengths" in names) == (stability == "descent")


@pytest.mark.parametrize("d_model", [16, 256])
def test_a_new_layer_starts_where_the_patterns_are(d_model: int) -> None:
    config = EquilibriumConfig(d_model=d_model, d_inner=2 * d_model, d_head=16)
    dynamics = TokenDynamics(config)
    c = torch.randn(1, 200, d_model)
    made = dynamics(c, sequence_layout(c), HopfieldMemory(d_model, 4)())
    assert torch.equal(made.start[0], made.field.u)
    assert made.field.u.norm(dim=-1).mean().item() == pytest.approx(d_model**0.25, rel=0.25)
    assert torch.linalg.matrix_norm(dynamics.weight, 2).item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_energies_are_of_float32_in_a_narrow_model_and_under_autocast(dtype: torch.dtype) -> None:
    wide = make_layer().float()
    c = context(2, 5, 8).to(dtype)

    def check(layer: torch.nn.Module, c: Tensor) -> None:
        dynamics = layer.dynamics(c, sequence_layout(c), layer.memory())
        parameters = layer.dynamics.energy_parameters(layer.memory())
        tensors = [*dynamics.field, dynamics.start, *(x for x in parameters if isinstance(x, Tensor))]
        assert all(x.dtype == torch.float32 for x in tensors)
        exact = wide.dynamics(c.float(), sequence_layout(c.float()), wide.memory()).field
        for a, e in zip(dynamics.field, exact, strict=True):
            assert (a - e).norm() < 4 * torch.finfo(dtype).eps * e.norm()

    check(copy.deepcopy(wide).to(dtype), c)
    with torch.autocast("cpu", dtype=dtype):
        check(wide, c.float())
    parameters = wide.dynamics.energy_parameters(wide.memory())
    with torch.autocast("cpu", dtype=dtype):
        again = wide.dynamics.energy_parameters(wide.memory())
    assert all(torch.equal(a, e) for a, e in zip(again, parameters, strict=True) if isinstance(a, Tensor))
