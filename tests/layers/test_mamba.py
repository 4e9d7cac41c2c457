"""The Mamba-2 mixer and the bare recurrence against their equations in float64; pads, packing, streams, memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helmholtz import reference
from helmholtz.layers.mamba import MambaCell, MambaMixer
from helmholtz.layers.sequence import sequence_layout
from helmholtz.layers.state import map_state

D, E, N, H = 12, 20, 6, 4
SIZES = {"d_inner": E, "d_state": N, "d_head": E // H}
MASK = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1], [0] * 11])


def make_mixer(**sizes: int) -> MambaMixer:
    mixer = MambaMixer(D, **SIZES | {"d_conv": 3} | sizes)
    nn.init.normal_(mixer.o_proj.weight, std=E**-0.5)
    for parameter in (mixer.norm.weight, mixer.conv_bias, mixer.D):
        nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.uniform_(mixer.step_sizes.bias, -2.0, 1.0)
    return mixer


def make_cell() -> MambaCell:
    cell = MambaCell(D, **SIZES)
    nn.init.uniform_(cell.step_sizes.bias, -2.0, 1.0)
    return cell


def textbook(mixer: MambaMixer, x: Tensor) -> Tensor:
    """The mixer of one sequence without pads, ``1 T D``, in float64 loops."""
    p = {name: value.detach().double() for name, value in mixer.named_parameters()}
    gate, signal, step = (x.double() @ p["in_proj.weight"].T).split([E, E + 2 * N, H], dim=-1)
    signal = F.silu(reference.causal_conv(signal, p["conv_weight"], p["conv_bias"])[0])
    u, b, c = signal.split([E, N, N], dim=-1)
    delta, rates = (step + p["step_sizes.bias"]).exp().log1p(), -p["step_sizes.A_log"].exp()
    y, _ = reference.ssd(u.unflatten(-1, (H, -1)), delta, rates, b, c, p["D"])
    y = y.flatten(2) * gate * gate.sigmoid()
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm.weight"]
    return y @ p["o_proj.weight"].T


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f"relative error {error:.3g}"


@pytest.mark.parametrize("d_conv", [1, 3, 4])
@pytest.mark.parametrize("time", [1, 2, 40, 70])
def test_matches_the_textbook(d_conv: int, time: int) -> None:
    mixer, x = make_mixer(d_conv=d_conv), torch.randn(1, time, D)
    assert_close(mixer(x), textbook(mixer, x))


def test_pads_of_any_pattern_are_as_if_they_were_not_there() -> None:
    mixer, x = make_mixer(), torch.randn(3, 11, D)
    dirty = x.masked_fill(MASK.unsqueeze(-1) == 0, torch.nan)
    y = mixer(dirty, attention_mask=MASK)
    assert not y[MASK == 0].any()
    for row, mask in enumerate(MASK[:2].bool()):
        assert_close(y[row, mask], textbook(mixer, x[row : row + 1, mask])[0])


def test_pads_give_and_get_no_gradient() -> None:
    mixer, x = make_mixer(), torch.randn(3, 11, D, requires_grad=True)
    mixer(x, attention_mask=MASK).square().sum().backward()
    assert not x.grad[MASK == 0].any()
    assert (x.grad[MASK == 1].abs().sum(-1) > 0).all()


def test_packed_sequences_are_separate_ones() -> None:
    mixer, x = make_mixer(), torch.randn(1, 24, D)
    packed, bounds = mixer(x, cu_seqlens=torch.tensor([0, 1, 3, 24])), [0, 1, 3, 24]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        assert_close(packed[:, start:stop], textbook(mixer, x[:, start:stop]))


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("step", [1, 2, 5, 11])
def test_a_stream_equals_one_pass(masked: bool, step: int) -> None:
    mixer, x = make_mixer().double(), torch.randn(3, 11, D, dtype=torch.float64)
    mask = MASK if masked else None
    state, parts = mixer.init_state(3), []
    for t in range(0, 11, step):
        part = None if mask is None else mask[:, t : t + step]
        y, state = mixer.step(x[:, t : t + step], state, attention_mask=part)
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), mixer(x, attention_mask=mask), 1e-12)
    assert state.position.tolist() == (MASK.sum(1).tolist() if masked else [11] * 3)


def test_a_state_does_not_grow_and_is_not_changed() -> None:
    mixer, x = make_mixer(), torch.randn(2, 30, D)
    _, state = mixer.step(x, mixer.init_state(2))
    assert (state.conv.shape, state.ssm.shape) == ((2, 2, E + 2 * N), (2, H, E // H, N))
    kept = map_state(torch.clone, state)
    mixer.step(x, state)
    assert torch.equal(state.conv, kept.conv) and torch.equal(state.ssm, kept.ssm)


@pytest.mark.parametrize("border", [1, 20, 63, 64, 69])
def test_the_future_changes_no_bit_and_has_no_gradient(border: int) -> None:
    mixer, x = make_mixer(), torch.randn(2, 70, D, requires_grad=True)
    other = torch.cat([x[:, :border], 100 * torch.randn(2, 70 - border, D)], dim=1)
    past = mixer(x)[:, :border]
    assert torch.equal(past, mixer(other)[:, :border])
    (g,) = torch.autograd.grad(past.square().sum(), x)
    assert not g[:, border:].any() and g[:, :border].any()


def test_large_step_sizes_forget_and_stay_finite() -> None:
    mixer, x = make_mixer(), torch.randn(1, 300, D, requires_grad=True)
    nn.init.constant_(mixer.step_sizes.bias, 200.0)  # e^{-delta A T} would be e^{-200 * 16 * 300}
    y = mixer(x)
    assert_close(y, textbook(mixer, x), 1e-5)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_rates_and_step_sizes_at_the_start() -> None:
    mixer = MambaMixer(64, d_inner=2048, d_state=4, d_head=16)
    delta, rates = mixer.step_sizes(torch.zeros(1, 1, 128), sequence_layout(torch.zeros(1, 1, 64)))
    assert delta.min() >= 1e-3 * (1 - 1e-4) and delta.max() <= 1e-1 * (1 + 1e-4)
    assert delta.log10().mean().item() == pytest.approx(-2, abs=0.15)
    torch.testing.assert_close(rates, -torch.linspace(1, 16, 128))
    assert all(p.ndim > 0 for p in mixer.parameters())


def past_and_gain(cell: MambaCell, c: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence without pads, a token after another in float64."""
    p = {name: value.detach().double() for name, value in cell.named_parameters()}
    v, b, r, d = (c.double() @ p["in_proj.weight"].T).split([E, N, N, H], dim=-1)
    delta, rates = (d + p["step_sizes.bias"]).exp().log1p(), -p["step_sizes.A_log"].exp()
    h, past, gain = torch.zeros(1, H, E // H, N, dtype=torch.float64), [], []
    for t in range(c.shape[1]):
        h = (delta[:, t] * rates).exp()[..., None, None] * h
        past.append(torch.einsum("bhpn,bn->bhp", h, r[:, t]).flatten(1))
        own = (b[:, t] * r[:, t]).sum(-1, keepdim=True).exp().log1p()
        gain.append((1 - (-delta[:, t] * own).exp()).repeat_interleave(E // H, dim=-1))
        value = delta[:, t].unsqueeze(-1) * v[:, t].unflatten(-1, (H, -1))
        h = h + torch.einsum("bhp,bn->bhpn", value, b[:, t])
    return torch.stack(past, dim=1), torch.stack(gain, dim=1)


@pytest.mark.parametrize("time", [1, 2, 70])
def test_the_cell_matches_its_equations(time: int) -> None:
    cell, c = make_cell(), torch.randn(1, time, D)
    past, gain, _ = cell(c, sequence_layout(c))
    wanted = past_and_gain(cell, c)
    assert not past[:, 0].any()
    assert time == 1 or past[:, 1:].any()
    torch.testing.assert_close(past.double(), wanted[0], rtol=0, atol=3e-6 * wanted[0].abs().max().item())
    assert_close(gain, wanted[1])
    assert gain.min() > 0 and gain.max() < 1


def test_the_cell_skips_pads_restarts_and_streams() -> None:
    cell, c = make_cell().double(), torch.randn(3, 11, D, dtype=torch.float64)
    dirty = c.masked_fill(MASK.unsqueeze(-1) == 0, torch.nan)
    whole = cell(dirty, sequence_layout(dirty, MASK))
    assert not whole[0][MASK == 0].any() and not whole[1][MASK == 0].any()
    for row, mask in enumerate(MASK[:2].bool()):
        for actual, expected in zip(whole, past_and_gain(cell, c[row : row + 1, mask]), strict=False):
            assert_close(actual[row, mask], expected[0], 1e-12)
    state, parts = None, []
    for t in range(11):
        layout = sequence_layout(dirty[:, t : t + 1], MASK[:, t : t + 1])
        past, gain, state = cell(dirty[:, t : t + 1], layout, state)
        parts.append(torch.cat([past, gain], dim=-1))
    assert_close(torch.cat(parts, dim=1), torch.cat(whole[:2], dim=-1), 1e-12)
    assert_close(state, whole[2], 1e-12)
    row = c[:1]
    packed = cell(row, sequence_layout(row, cu_seqlens=torch.tensor([0, 4, 11])))
    for actual, expected in zip(packed, past_and_gain(cell, row[:, 4:]), strict=False):
        assert_close(actual[:, 4:], expected, 1e-12)


def test_gain_saturates_below_one_and_vanishes_above_zero() -> None:
    """Also where the step is so small that ``1 - e^{-x}`` would be 0 in float32."""
    cell, c = make_cell(), torch.randn(1, 50, D)
    nn.init.constant_(cell.step_sizes.bias, -20.0)
    gain = cell(c, sequence_layout(c))[1]
    assert_close(gain, past_and_gain(cell, c)[1])
    assert (gain > 0).all()


def _mixer_run(mixer: MambaMixer) -> Callable[[Tensor], Tensor]:
    return lambda x: mixer(x, attention_mask=MASK)


def _cell_run(cell: MambaCell) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat(cell(x, sequence_layout(x, MASK))[:2], dim=-1)


MODULES = {"mixer": (make_mixer, _mixer_run), "cell": (make_cell, _cell_run)}


@pytest.mark.parametrize("name", MODULES)
def test_checkpointing_recomputes_with_the_same_gradients(name: str) -> None:
    make, runs = MODULES[name]
    module, x = make(), torch.randn(3, 11, D, requires_grad=True)
    run, kept = runs(module), []

    def gradients() -> list[Tensor]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z: (sizes.append(z.numel()), z)[1], lambda z: z):
            total = run(x).square().sum()
        kept.append(sum(sizes))
        return list(torch.autograd.grad(total, [x, *module.parameters()]))

    plain = gradients()
    module.gradient_checkpointing_enable()
    recomputed = gradients()
    module.gradient_checkpointing_disable()
    again = gradients()
    for a, b, c in zip(plain, recomputed, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert kept[1] < kept[0] / 2 and kept[2] == kept[0]


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_autocast_computes_the_recurrence_in_float32(name: str) -> None:
    make, runs = MODULES[name]
    module, x = make(), torch.randn(3, 11, D)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = runs(module)(x)
    wide = runs(module)(x)
    assert ((narrow - wide).square().mean() / wide.square().mean()).sqrt() < 2 * torch.finfo(
        torch.bfloat16
    ).eps


@pytest.mark.parametrize("cls", [MambaMixer, MambaCell])
def test_sizes_are_checked(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="d_head must divide d_inner, got d_head=48 and d_inner=64"):
        cls(32, d_inner=64, d_head=48)
    with pytest.raises(ValueError, match="d_state must be an integer of at least 1, got 0"):
        cls(32, d_inner=64, d_state=0)


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match=r"x: wanted shape \(B, T, d_model=12\), got \(1, 3, 5\)"):
        make_mixer()(torch.zeros(1, 3, 5))
    c = torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match=r"c: wanted shape \(B, T, d_model=12\), got \(1, 3, 5\)"):
        make_cell()(c, sequence_layout(c))
    with pytest.raises(ValueError, match="state: it belongs to 2 rows, the input has 3"):
        make_mixer().step(torch.zeros(3, 1, D), make_mixer().init_state(2))
