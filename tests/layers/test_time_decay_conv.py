"""Time-decay conditioning against its recurrence, with masks, packing, streams and from the end."""

import math
from copy import deepcopy

import pytest
import torch

from fem_cases import difference, stir
from helmholtz.layers.sequence import sequence_layout
from helmholtz.layers.time_decay_conv import TimeDecayConditioning

D = 10


def make(width=4, *, scale=0.5, **options):
    return stir(TimeDecayConditioning(D, width, 3, **options).eval(), scale=scale)


def sequential(tdc, x):
    """``h`` of one row and the features, token by token in float64."""
    tdc, x = tdc.double(), x.double()
    rate, drive, gate = tdc.in_proj(tdc.norm(x)).chunk(3, dim=-1)
    h, rows = torch.zeros_like(drive[0]), []
    for a, u in zip(rate.unbind(0), drive.unbind(0), strict=True):
        h = h / (1 + a.exp()) + u
        rows.append(h)
    gate = torch.nn.functional.softplus(gate)
    scaled = gate / gate.square().mean(-1, keepdim=True).sqrt()
    return scaled * tdc.state_norm(torch.stack(rows))


@pytest.mark.parametrize("slow", [False, True], ids=["decay of one token", "decay of a thousand tokens"])
def test_it_is_the_sequential_recurrence_at_length_4096(slow):
    tdc, x = make(), torch.randn(1, 4096, D)
    if slow:
        with torch.no_grad():
            tdc.in_proj.weight[:4] = 0
            tdc.in_proj.bias[:4] = -7.0
    features, _ = tdc(x, sequence_layout(x))
    expected = sequential(tdc, x[0])
    assert difference(features[0], expected) < 1e-5
    assert difference(features[0, 4000:], expected[4000:]) < 1e-5


def test_gradients_are_those_of_the_recurrence():
    tdc, x = make().double(), torch.randn(1, 300, D, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **{k: v for k, v in tdc.named_parameters() if "out_proj" not in k}}
    cotangent = torch.randn(300, 4, dtype=torch.float64)
    features, _ = tdc(x, sequence_layout(x))
    got = torch.autograd.grad((features[0] * cotangent).sum(), leaves.values())
    want = torch.autograd.grad((sequential(tdc, x[0]) * cotangent).sum(), leaves.values())
    for name, a, b in zip(leaves, got, want, strict=True):
        assert difference(a, b) < 1e-9, name


def test_it_remembers_as_long_as_it_decays():
    """An impulse 1000 tokens back is still there when the decay is slow: nothing is switched off with distance."""
    tdc = make(norm_first=False)
    with torch.no_grad():
        tdc.in_proj.weight[:4] = 0
        tdc.in_proj.bias[:4] = -math.log(math.expm1(1e-3))
        tdc.in_proj.bias[:4].neg_()  # decay e^{-0.001}
        tdc.in_proj.bias[4:] = 0
    x = torch.zeros(1, 2000, D)
    x[:, 0] = 1.0
    x.requires_grad_()
    _, states = zip(
        *[tdc(x[:, :length], sequence_layout(x[:, :length])) for length in (1, 1001, 2000)], strict=True
    )
    torch.testing.assert_close(states[1] / states[0], torch.full((1, 4), math.exp(-1.0)), rtol=1e-3, atol=0)
    torch.testing.assert_close(states[2] / states[0], torch.full((1, 4), math.exp(-1.999)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pads_pass_the_state_through(bidirectional):
    tdc, x = make(bidirectional=bidirectional), torch.randn(2, 9, D)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [1] * 9]).bool()
    features, state = tdc(x, sequence_layout(x, attention_mask=mask))
    alone = x[:1, mask[0]]
    expected, last = tdc(alone, sequence_layout(alone))
    assert difference(features[:1, mask[0]], expected) < 1e-5
    assert difference(state[:1], last) < 1e-5


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_start_anew_at_both_ends(bidirectional):
    tdc, x = make(bidirectional=bidirectional), torch.randn(1, 12, D)
    features, _ = tdc(x, sequence_layout(x, cu_seqlens=torch.tensor([0, 1, 8, 12])))
    for start, stop in [(0, 1), (1, 8), (8, 12)]:
        part = x[:, start:stop]
        assert difference(features[:, start:stop], tdc(part, sequence_layout(part))[0]) < 1e-5


def test_a_stream_continues_where_it_stopped():
    tdc, x = make(), torch.randn(2, 50, D)
    state, parts = None, []
    for start, stop in [(0, 1), (1, 30), (30, 31), (31, 50)]:
        part = x[:, start:stop]
        features, state = tdc(part, sequence_layout(part), state)
        parts.append(features)
    whole, last = tdc(x, sequence_layout(x))
    assert difference(torch.cat(parts, dim=1), whole) < 1e-5
    assert difference(state, last) < 1e-5


def test_the_second_half_reads_from_the_end():
    """Reversing time swaps the halves, once their weights are swapped too."""
    tdc, x = make(6, bidirectional=True), torch.randn(2, 20, D)
    swapped = make(6, bidirectional=True)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    with torch.no_grad():
        swapped.load_state_dict(tdc.state_dict())
        for parameter in (swapped.in_proj.weight, swapped.in_proj.bias):
            parameter.copy_(torch.cat([part[order] for part in parameter.chunk(3)]))
        for parameter in swapped.state_norm.parameters():
            parameter.copy_(parameter[order])
    forward, backward = tdc(x, sequence_layout(x))[0], swapped(x.flip(1), sequence_layout(x))[0]
    assert difference(backward.flip(1)[..., order], forward) < 1e-5


def test_the_halves_see_opposite_sides():
    tdc = make(6, bidirectional=True)
    x = torch.randn(1, 20, D, requires_grad=True)
    layout = sequence_layout(x)
    _, state = tdc(x, layout)
    assert state.shape == (1, 6)
    (grad,) = torch.autograd.grad(tdc(x, layout)[0][:, 10].square().sum(), x)
    assert (grad.abs().amax(-1) > 0).all()
    one_way = make(6)
    (grad,) = torch.autograd.grad(one_way(x, layout)[0][:, 10].square().sum(), x)
    assert (grad[:, 11:] == 0).all() and (grad[:, :11].abs().amax(-1) > 0).all()


def test_an_odd_width_cannot_be_split():
    with pytest.raises(ValueError, match="tdc_width: .* got 5"):
        TimeDecayConditioning(D, 5, 3, bidirectional=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_norms_are_summed_wide_under_autocast(dtype):
    tdc = TimeDecayConditioning(8, 6, 16)
    for parameter in tdc.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 2000, 8).to(dtype)
    cotangent = torch.randn(2, 2000, 6)
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = tdc(x, sequence_layout(x))
    weights = [*tdc.norm.parameters(), *tdc.state_norm.parameters()]
    found = torch.autograd.grad(features, weights, cotangent.to(features.dtype))
    exact = deepcopy(tdc).double()
    features, _ = exact(x.double(), sequence_layout(x))
    weights = [*exact.norm.parameters(), *exact.state_norm.parameters()]
    for a, e in zip(found, torch.autograd.grad(features, weights, cotangent.double()), strict=True):
        assert (a - e).norm() <= 4 * torch.finfo(torch.bfloat16).eps * e.norm()
