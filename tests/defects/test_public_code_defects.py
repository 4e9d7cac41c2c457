"""The faults measured in the public code of the Free Energy Mixer, by number: none of them may come back.

Each test fails when the described behaviour is put into this library.
"""

import sys
import types
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from fem_cases import (
    LINEAR_TIME_PRIORS,
    WIDTH,
    Given,
    LargestTensor,
    difference,
    make_mixer,
    mixer_config,
    prior_features,
    stir,
    tokens,
)
from fem_oracle import tdc_features
from helmholtz import kernels
from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig, fem_widths
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout
from helmholtz.layers.sizing import count_parameters, matched_d_ff
from helmholtz.ops.free_energy import free_energy_from_mixed, tilt_values
from helmholtz.ops.rope import rope
from helmholtz.reference import free_energy as reference
from helmholtz.reference import linear_attention as reference_linear_attention

every_prior = pytest.mark.parametrize("prior", PRIORS)
linear = import_module("helmholtz.ops.linear_attention")  # the package exports a function of that name


def average(mixer, features, signals):
    """What the prior makes of ``B H T S V``."""
    layout = sequence_layout(torch.zeros(signals.shape[0], signals.shape[2], 1))
    return mixer.prior(features, signals[:, :, :, 0], Given(signals), layout, layout, None)[0]


def read(mixer, features, v, beta):
    """``(mean, free)`` of values ``B H T V``."""
    temperature = torch.full((v.shape[1], v.shape[3]), beta, dtype=v.dtype)
    return free_energy_from_mixed(
        average(mixer, features, tilt_values(v, temperature, cap=40.0)), temperature
    )


def test_defect_01_rotary_positions_are_a_rotation():
    q, k = torch.randn(2, 16, dtype=torch.float64).unbind(0)
    rows = rope(torch.stack([q, k])[:, None, None].expand(2, 1, 64, 16), torch.arange(64))
    assert ((rows.norm(dim=-1) / torch.stack([q, k]).norm(dim=-1)[:, None, None] - 1).abs() < 1e-6).all()
    for offset in (0, 1, 5):
        assert (rows[0, 0, offset:] * rows[1, 0, : 64 - offset]).sum(-1).std() < 1e-5


def test_defect_02_bfloat16_keeps_positions_apart():
    x = torch.randn(1, 1, 1, 32).bfloat16().expand(1, 1, 4096, 32)
    positions = torch.arange(4096)
    exact = reference.rope(x, positions[None])
    error = (rope(x, positions).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.005
    assert not list(make_mixer("softmax").buffers()), "a buffer of frequencies would be cast with the module"


@every_prior
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_defect_03_pads_have_no_weight_anywhere(prior, causal):
    mixer = stir(make_mixer(prior, causal=causal), scale=1.0)
    x, pads = tokens(2, 12), tokens(2, 8, seed=7).requires_grad_()
    expected = mixer(x)
    for before in (0, 7, 12):  # left, interior, right
        rows = torch.cat([x[:, :before], pads, x[:, before:]], 1)
        mask = torch.tensor([[1] * before + [0] * 8 + [1] * (12 - before)] * 2)
        padded = mixer(rows, attention_mask=mask)[:, mask[0].bool()]
        assert difference(padded, expected) < 1e-5
        (grad,) = torch.autograd.grad(padded.square().sum(), pads)
        assert (grad == 0).all()


def test_defect_04_conditioning_does_not_fade_with_length():
    mixer, x = make_mixer("softmax", tdc_norm_first=False), tokens(1, 4096)
    features, _ = mixer.tdc(x, sequence_layout(x))
    assert difference(features[0], tdc_features(mixer, x[0])) < 1e-5
    assert features[0, 4000:].norm() > 0.5 * features[0, :96].norm()


@every_prior
@pytest.mark.parametrize("length", [64, 300])
def test_defect_05_float16_is_finite(prior, length):
    mixer = make_mixer(prior).half()
    assert mixer(tokens(2, length).half()).isfinite().all()


@every_prior
@pytest.mark.parametrize("read", ["temperature", "free_energy"])
def test_defect_06_dropout_leaves_a_distribution_and_finite_gradients(prior, read):
    mixer = make_mixer(prior, dropout=0.1, read=read).train()
    x = tokens(4, 300).requires_grad_()
    y, quiet = mixer(x), mixer.eval()(x)
    y.square().sum().backward()
    assert y.isfinite().all() and (y == 0).any()
    torch.testing.assert_close(y[y != 0], quiet[y != 0] / 0.9)  # the weights themselves are whole
    assert all(leaf.grad.isfinite().all() for leaf in [x, *mixer.parameters()])


@every_prior
@pytest.mark.parametrize("read", ["temperature", "free_energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_defect_07_the_future_moves_no_bit_of_the_past(prior, read, dtype):
    mixer = make_mixer(prior, read=read).to(dtype)
    x = tokens(2, 40).to(dtype)
    shaken = x.clone()
    shaken[:, 20:] += 1e3
    assert torch.equal(mixer(shaken)[:, :20], mixer(x)[:, :20])
    leaf = shaken.float().requires_grad_()
    (grad,) = torch.autograd.grad(mixer.float()(leaf)[:, :20].square().sum(), leaf)
    assert grad.isfinite().all() and (grad[:, 20:] == 0).all()


@pytest.mark.parametrize("size", [5.0, 20.0, 1e4])
def test_defect_08_large_future_keys_do_not_drown_the_past_of_rnn_softmax(size):
    mixer = make_mixer("rnn_softmax").float()
    features = {name: f.float() for name, f in prior_features(mixer, 1, 30).items()}
    v = torch.randn(1, 3, 30, 4)
    before = read(mixer, features, v, 2.0)
    late = features["k"].clone()
    late[:, -1] *= size
    late[:, -1] += 10 * size
    late.requires_grad_()
    after = read(mixer, {**features, "k": late}, v, 2.0)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :-1], b[:, :, :-1])
        (grad,) = torch.autograd.grad(b[:, :, :-1].sum(), late, retain_graph=True)
        assert (grad[:, -1] == 0).all()


def test_defect_09_the_gate_of_rnn_softmax_scales_the_read_and_not_the_weights():
    mixers = {
        name: make_mixer("rnn_softmax", read=name, outer_gate=False, bias=True)
        for name in ("mean", "free_energy")
    }
    mean, free = mixers.values()
    with torch.no_grad():
        mean.o_proj.weight.zero_()[:12].fill_diagonal_(1.0)
        mean.o_proj.bias.zero_()
        free.load_state_dict(mean.state_dict())
        x = tokens(2, 30)
        assert ((free(x) - mean(x))[..., :12] >= -1e-5).all()  # gate (F - mean), gate > 0
        for mixer in mixers.values():  # constant values
            mixer.in_proj.weight[-12:] = 0
            mixer.in_proj.bias[-12:] = 3.0
            mixer.tdc.out_proj.weight[-12:] = 0
        assert difference(free(x), mean(x)) < 1e-5
        features, _ = mean.project(x, sequence_layout(x))
        gate = F.softplus(mean.prior.output_gate(features, sequence_layout(x))) + 1e-6
        gate = F.rms_norm(gate, (4,)).flatten(-2)
        torch.testing.assert_close(mean(x)[..., :12], 3.0 * gate)


def test_defect_10_rnn_softmax_weighs_both_signals_alike_and_refuses_other_widths():
    with pytest.raises(ValueError, match="d_head must be d_head_v = 4 for rnn_softmax"):
        mixer_config("rnn_softmax", d_head=8)
    mixer = make_mixer("rnn_softmax").double()
    features, v = prior_features(mixer, 2, 30), 3 * torch.randn(2, 3, 30, 4, dtype=torch.float64)
    mean, free = read(mixer, features, v, 2.0)
    assert (free >= mean - 1e-12).all()
    half = average(mixer, features, torch.stack([v, v], dim=3))
    assert torch.equal(half[..., 0, :], half[..., 1, :])


@pytest.mark.parametrize("raw", [0.0, -3.2, -16.0, -400.0], ids="decay {}".format)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_defect_11_gla_forgets_at_any_distance(raw, kind):
    """Log decays of 0.04, 0.2, 1 and 25 nats per step over 2048 steps."""
    mixer = make_mixer("gla", decay=kind, rope_theta=0.0)
    features = {name: f.float() for name, f in prior_features(mixer, 1, 2048).items()}
    features["decay"] = torch.full_like(features["decay"], raw)
    v = torch.randn(1, 3, 2048, 4)
    mean = average(mixer, features, v.unsqueeze(3))[..., 0, :]
    q, k = (
        features[name].unflatten(-1, (3, 6)).transpose(1, 2).relu() + mixer.config.eps for name in ("q", "k")
    )
    decay = torch.nn.functional.logsigmoid(features["decay"].double()).transpose(1, 2) / 16
    decay = decay if kind == "head" else decay.unflatten(1, (3, 6)).transpose(2, 3)
    sums, _ = reference_linear_attention(q, k, torch.nn.functional.pad(v, (0, 1), value=1.0), decay)
    assert difference(mean, sums[..., :-1] / sums[..., -1:]) < 1e-4
    if raw < -1:
        v[:, :, 310] += 100
        moved = average(mixer, features, v.unsqueeze(3))[..., 0, :]
        assert difference(moved[:, :, 2000:], mean[:, :, 2000:]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_defect_12_gla_is_accurate_in_low_precision(dtype):
    mixer = stir(FreeEnergyMixer(mixer_config("gla")).eval(), scale=0.2)
    x = tokens(1, 2048).to(dtype)
    with torch.no_grad():
        narrow, exact = mixer.to(dtype)(x).double(), mixer.double()(x.double())
    error = (narrow - exact).norm(dim=-1) / exact.norm(dim=-1).mean()
    assert error.isfinite().all() and error.mean() < 0.01 and error[:, 1024:].mean() < 0.01


@every_prior
@pytest.mark.parametrize("dead", [False, True], ids=["", "dead features"])
def test_defect_13_weights_sum_to_one(prior, dead):
    mixer = make_mixer(prior).float()
    features = {name: f.float() for name, f in prior_features(mixer, 1, 200).items()}
    if dead:
        features = {name: -20.0 - f.abs() for name, f in features.items()}
    v = torch.full((1, 3, 200, 4), 3.0)
    for value in read(mixer, features, v, 1.95):
        torch.testing.assert_close(value, v, rtol=1e-5, atol=0)


@every_prior
def test_defect_14_without_causality_the_past_sees_the_future(prior):
    mixer, x = make_mixer(prior, causal=False, tdc_width=0), tokens(1, 20)
    shaken = x.clone()
    shaken[:, 15:] += 1.0
    assert (mixer(shaken) - mixer(x))[:, :15].abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("prior", ["linear", "gla"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_defect_15_a_kernel_does_not_make_a_bidirectional_mixer_causal(prior, causal, monkeypatch):
    """With a causal kernel in place of ours, the output stays the same."""
    mixer, x = make_mixer(prior, causal=causal), tokens(2, 20)
    expected, calls = mixer(x), []

    def kernel(*args):
        calls.append(args)
        return linear.recurrent_linear_attention(*args[:4], state=args[4], reset=args[5])

    ours = linear._BACKENDS[1]
    monkeypatch.setattr(linear, "_BACKENDS", (linear.Backend("fla", kernel, lambda *_: None), ours))
    with kernels.plain_forms():  # on the CPU ours would come first
        assert difference(mixer(x), expected) < 1e-5
    assert len(calls) == (1 if causal else 2)


@every_prior
def test_defect_16_the_second_half_of_the_conditioning_reads_from_the_end(prior):
    mixer = make_mixer(prior, causal=False, tdc_bidirectional=True)
    x, half = tokens(1, 20), mixer.config.tdc_width // 2
    shaken = x.clone()
    shaken[:, 12:] = tokens(1, 8, seed=9)
    layout = sequence_layout(x)
    before, after = (mixer.tdc(z, layout)[0] for z in (x, shaken))
    moved = (after - before)[:, :12].abs().amax((0, 2))
    assert moved[-1] > 1e-3 and (moved[-4:] > 0).all()
    with torch.no_grad():  # equal weights in both halves: reversing time swaps them
        for parameter in (mixer.tdc.in_proj.weight, mixer.tdc.in_proj.bias):
            for part in parameter.chunk(3):
                part[half:] = part[:half]
        for parameter in mixer.tdc.state_norm.parameters():
            parameter[half:] = parameter[:half]
        forward, backward = mixer.tdc(x, layout)[0], mixer.tdc(x.flip(1), layout)[0].flip(1)
    assert difference(backward.roll(half, dims=-1), forward) < 1e-5
    with pytest.raises(ValueError, match="tdc_bidirectional: got True, but causal=True"):
        mixer_config(prior, tdc_bidirectional=True)


def test_defect_17_mamba_reads_free_energies_with_and_without_its_package(monkeypatch):
    mixer, x = make_mixer("mamba"), tokens(1, 30)
    y = mixer(x)
    y.square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in mixer.parameters())
    gates = list({**mixer.query_widths}).index("inner") * 12
    with torch.no_grad():
        mixer.in_proj.weight[gates : gates + 12] *= -1
    assert difference(mixer(x), y) > 1e-2
    features = {name: f.float() for name, f in prior_features(mixer, 1, 30).items()}
    for value in read(mixer, features, torch.full((1, 3, 30, 4), 3.0), 1.95):
        torch.testing.assert_close(value, torch.full_like(value, 3.0), rtol=1e-5, atol=0)
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    assert make_mixer("mamba").state_dict().keys() == mixer.state_dict().keys()


@pytest.mark.parametrize("prior", LINEAR_TIME_PRIORS)
def test_defect_18_no_tensor_of_size_time_times_keys_times_values(prior):
    """At D = 256 and T = 1024: what the public code holds is 64 times T D."""
    mixer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=256, n_heads=4, prior=prior))
    x = torch.randn(1, 1024, 256, requires_grad=True)
    with LargestTensor() as largest:
        mixer(x).sum().backward()
    assert largest.elements <= 4 * x.numel()


class Broken(types.ModuleType):
    """A package that is installed and of no use here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"{self.__name__}.{name} was used for tensors on the CPU")


@every_prior
@pytest.mark.parametrize("read", ["temperature", "mean"])
def test_defect_19_packages_for_gpus_are_left_alone_on_a_cpu(prior, read, monkeypatch):
    """In bfloat16 and with TF32 permitted: nothing but the device speaks against the kernels."""
    mixer, x = make_mixer(prior, read=read).bfloat16(), tokens(2, 20).bfloat16()
    expected = mixer(x)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.simple_gla", "mamba_ssm", "flash_attn"):
        module = Broken(name)
        module.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    assert torch.equal(mixer(x), expected)


@every_prior
@pytest.mark.parametrize("beta", [1.95, 20.0])
def test_defect_20_the_cap_leaves_the_mean_alone(prior, beta):
    mixer = make_mixer(prior)
    features = {name: f.float() for name, f in prior_features(mixer, 1, 30).items()}
    v = torch.full((1, 3, 30, 4), 100.0, requires_grad=True)
    mean, free = read(mixer, features, v, beta)
    torch.testing.assert_close(mean, torch.full_like(mean, 100.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(free, torch.full_like(free, 40.0 / beta), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(mean.sum(), v)
    torch.testing.assert_close(grad.sum(), torch.tensor(360.0), rtol=1e-4, atol=0)


OPTIONS = [{"read": r, "outer_gate": g, "bias": b} for r, g, b in [
    ("temperature", True, True), ("free_energy", True, False), ("free_energy", False, False), ("mean", True, False),
    ("mean", False, True), ("temperature", False, False),
]]  # fmt: skip


@every_prior
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_defect_21_every_parameter_has_a_gradient(prior, options):
    mixer = FreeEnergyMixer(mixer_config(prior, **options))
    torch.nn.init.normal_(mixer.tdc.out_proj.weight, std=0.1)
    mixer(tokens(2, 30)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    widths = {**mixer.query_widths, **mixer.key_widths}
    for weight in (mixer.in_proj.weight, mixer.tdc.out_proj.weight):
        for name, part in zip(widths, weight.grad.split(list(widths.values())), strict=True):
            assert (part != 0).any(), f"{name} is computed and ignored"


def test_defect_22_options_act_or_are_refused():
    x = tokens(1, 12)
    for prior, name in [("softmax", "flash_attn"), ("linear", "fla"), ("gla", "fla")]:
        with pytest.raises(ValueError, match=f"'{name}' cannot run this call: "):
            make_mixer(prior, backend=name)(x)
    for dead in (
        {"decay": "head"},
        {"d_state": 4},
        {"normalize": False},
        {"tdc_width": 0, "tdc_norm_first": False},
    ):
        with pytest.raises(ValueError, match=list(dead)[-1]):
            mixer_config("softmax", **dead)
    reads = [make_mixer("softmax", read=name) for name in ("mean", "free_energy", "temperature")]
    assert len({tuple(mixer(x)[0, -1].tolist()) for mixer in reads}) == 3
    before = reads[-1](x)
    with torch.no_grad():
        reads[-1].theta += 1.0
    assert difference(reads[-1](x), before) > 1e-3


@every_prior
def test_defect_23_budgets_match(prior):
    for d_model, n_heads in [(128, 4), (128, 16), (512, 8)]:
        mixer, d_ff = FreeEnergyMixerConfig(d_model=d_model, n_heads=n_heads, prior=prior), 8 * d_model // 3
        with torch.device("meta"):
            modules = [FreeEnergyMixer(mixer), SwiGLU(d_model, matched_d_ff(mixer, d_ff=d_ff))]
            baseline = [Attention(d_model, n_heads), SwiGLU(d_model, d_ff)]
        ours, theirs = (sum(p.numel() for m in ms for p in m.parameters()) for ms in (modules, baseline))
        assert abs(ours / theirs - 1) < 0.02
    if prior in ("softmax", "linear"):
        bare = FreeEnergyMixerConfig(d_model=512, n_heads=8, prior=prior, tdc_width=0)
        assert abs(count_parameters(FreeEnergyMixer(bare)) / (4 * 512**2) - 1) < 0.001
    assert fem_widths(40, 8, fem_ratio=0.5).d_head_v == 3, "half-way cases round up"
    assert fem_widths(1360, 16, fem_ratio=1.0).d_head_v == 85, "the value width need not be a multiple of 4"


@every_prior
def test_defect_24_the_calls_that_were_missing(prior, capsys):
    mixer = make_mixer(prior)
    assert capsys.readouterr().out == ""
    assert mixer(tokens(2, 0)).shape == (2, 0, WIDTH)
    x = tokens(1, 10)
    whole = mixer(x)
    first, state = mixer.step(x[:, :6], mixer.init_state(1))
    second, _ = mixer.step(x[:, 6:], state)  # continues at position 6
    assert difference(torch.cat([first, second], 1), whole) < 1e-5
    packed = mixer(torch.cat([x, x], 1), cu_seqlens=torch.tensor([0, 10, 20]))
    assert difference(packed, torch.cat([whole, whole], 1)) < 1e-5
    if prior == "softmax":
        assert make_mixer(prior, n_kv_heads=1)(x).shape == x.shape
        both_ways = make_mixer(prior, causal=False)
        assert difference(both_ways(x, context=x), both_ways(x)) < 1e-5
