"""The mixer as a layer: special cases, precision, gradients, memory, options."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fem_cases import WIDTH, difference, make_mixer, mixer_config, stir, tokens
from fem_oracle import mixer_output
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig
from helmholtz.layers.init import initializer_range
from helmholtz.layers.sequence import sequence_layout

every_prior = pytest.mark.parametrize("prior", PRIORS)
EXACT = 1e-5


def rows_of(mixer):
    """``in_proj`` rows by feature."""
    rows, start = {}, 0
    for name, width in {**mixer.query_widths, **mixer.key_widths}.items():
        rows[name], start = slice(start, start + width), start + width
    return rows


def identity_output(mixer, *, gate_open=True):
    """Make ``o_proj`` pass the read through, padded with zeros; the conditioning idle and the gates constant."""
    width = mixer.o_proj.in_features
    with torch.no_grad():
        mixer.o_proj.weight.zero_()[:width].fill_diagonal_(1.0)
        if mixer.tdc is not None:
            mixer.tdc.out_proj.weight.zero_()
        for name in ("outer", "q") if mixer.config.prior == "rnn_softmax" and gate_open else ("outer",):
            if name in rows_of(mixer):
                mixer.in_proj.weight[rows_of(mixer)[name]] = 0
    return mixer


# ---- special cases


@pytest.mark.parametrize("causal", [True, False])
def test_with_lambda_0_and_g_1_the_softmax_prior_is_attention(causal):
    """``nn.MultiheadAttention`` with the same weights, rotary positions off."""
    mixer = make_mixer(
        "softmax", n_heads=3, d_head=8, d_head_v=8, rope_theta=0.0, tdc_width=0, causal=causal, bias=True
    )
    rows = rows_of(mixer)
    plain = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
    with torch.no_grad():
        for name in ("inner", "outer"):
            mixer.in_proj.weight[rows[name]] = 0
        mixer.in_proj.bias[rows["inner"]] = -1e4  # lambda = 0
        mixer.in_proj.bias[rows["outer"]] = 1.0  # equal within a head: g = 1
        order = torch.cat([torch.arange(WIDTH * 9)[rows[name]] for name in ("q", "k", "v")])
        plain.in_proj_weight.copy_(mixer.in_proj.weight[order])
        plain.in_proj_bias.copy_(mixer.in_proj.bias[order])
        plain.out_proj.load_state_dict(mixer.o_proj.state_dict())
    x = tokens(2, 9)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    assert difference(mixer(x), plain(x, x, x, attn_mask=hidden, need_weights=False)[0]) < EXACT
    bare = make_mixer("softmax", n_heads=3, d_head=8, d_head_v=8, rope_theta=0.0, tdc_width=0, causal=causal,
                      bias=True, read="mean", outer_gate=False)  # fmt: skip
    with torch.no_grad():
        for part, source in [(bare.in_proj, mixer.in_proj)]:
            part.weight.copy_(source.weight[order])
            part.bias.copy_(source.bias[order])
        bare.o_proj.load_state_dict(mixer.o_proj.state_dict())
    assert difference(bare(x), mixer(x)) < EXACT


@every_prior
@pytest.mark.parametrize("read", ["mean", "free_energy", "temperature"])
@pytest.mark.parametrize("constant", [3.0, -7.0])
def test_constant_values_are_read_as_they_are(prior, read, constant):
    """sum p = 1 for every prior, so mean = F = c; also past float32's exp of the sum of weights."""
    mixer = identity_output(make_mixer(prior, read=read, bias=True))
    rows = rows_of(mixer)
    with torch.no_grad():
        mixer.o_proj.bias.zero_()
        mixer.in_proj.weight[rows["v"]] = 0
        mixer.in_proj.bias[rows["v"]] = constant
        mixer.in_proj.bias[rows["outer"]] = 1.0
        if prior == "rnn_softmax":
            mixer.in_proj.weight[rows["q"]] = 0
            mixer.in_proj.bias[rows["q"]] = 0
    y = mixer(tokens(2, 200))[..., : mixer.o_proj.in_features]
    torch.testing.assert_close(y, torch.full_like(y, constant), rtol=2e-5, atol=0)


@every_prior
def test_reads_lie_between_the_mean_and_the_largest_value(prior):
    options = {"outer_gate": False, "bias": False}
    mixers = {
        read: identity_output(make_mixer(prior, read=read, **options)) for read in ("mean", "free_energy")
    }
    if prior == "rnn_softmax":
        for mixer in mixers.values():
            with torch.no_grad():
                mixer.in_proj.weight[rows_of(mixer)["q"]] = 0
    x = tokens(2, 30)
    width = mixers["mean"].o_proj.in_features
    mixers["free_energy"].load_state_dict(mixers["mean"].state_dict())
    mean, free = (mixers[read](x)[..., :width] for read in ("mean", "free_energy"))
    v = nn.functional.linear(x, mixers["mean"].in_proj.weight[rows_of(mixers["mean"])["v"]])
    top = v.cummax(1).values
    assert (free - mean > -1e-5).all() and (top - free > -1e-5).all()
    assert (free - mean).max() > 0.1 and (top - free).max() > 0.1


@every_prior
def test_beyond_the_cap_the_mean_stays_linear(prior):
    mixer = identity_output(make_mixer(prior, read="mean", outer_gate=False))
    x = tokens(1, 20)
    with torch.no_grad():
        before = mixer(x)
        mixer.in_proj.weight[rows_of(mixer)["v"]] *= 1e4
        assert difference(mixer(x), 1e4 * before) < EXACT


@every_prior
def test_one_token_reads_itself_and_none_reads_nothing(prior):
    mixer = make_mixer(prior)
    for batch in (1, 3):
        x = tokens(batch, 1).requires_grad_()
        y = mixer(x)
        assert difference(y, mixer_output(mixer, x)) < EXACT
        (got,) = torch.autograd.grad(y.square().sum(), x)
        (want,) = torch.autograd.grad(mixer_output(mixer, x).square().sum(), x)
        assert difference(got, want) < EXACT
    for empty in (mixer(tokens(2, 0)), mixer.step(tokens(2, 0), mixer.init_state(2))[0]):
        assert empty.shape == (2, 0, WIDTH)
    assert mixer(tokens(2, 0), attention_mask=torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, WIDTH)
    assert mixer(tokens(0, 5)).shape == (0, 5, WIDTH)


@every_prior
def test_an_empty_step_changes_nothing(prior):
    mixer, x = make_mixer(prior), tokens(2, 7)
    with torch.no_grad():
        _, state = mixer.step(x[:, :4], mixer.init_state(2))
        _, state = mixer.step(x[:, :0], state)
        y, _ = mixer.step(x[:, 4:], state)
    assert difference(y, mixer(x)[:, 4:]) < EXACT


# ---- precision and gradients


@every_prior
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_narrow_dtypes_give_finite_outputs_and_gradients_with_dropout(prior, dtype, how):
    mixer = stir(FreeEnergyMixer(mixer_config(prior, dropout=0.1)), scale=0.2).train()
    x = tokens(2, 300)
    mask = torch.rand(2, 300) > 0.1
    if how == "cast":
        mixer, x = mixer.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        y = mixer(x, attention_mask=mask)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().square().mean().backward()
    for name, leaf in {"x": x, **dict(mixer.named_parameters())}.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad != 0).any(), name


@every_prior
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_as_close_as_their_rounding(prior, dtype):
    """A few roundings, at any length: nothing accumulates in the narrow dtype."""
    mixer = stir(FreeEnergyMixer(mixer_config(prior)).eval(), scale=0.2)
    x = tokens(1, 2048).to(dtype)
    with torch.no_grad():
        narrow = mixer.to(dtype)(x).float()
        exact = mixer.float()(x.float())
    error = (narrow - exact).square().mean(-1).sqrt() / exact.square().mean().sqrt()
    assert error[:, 1024:].mean() < 4 * torch.finfo(dtype).eps
    assert error[:, 1024:].mean() < 2 * error[:, :1024].mean()


@every_prior
def test_dropout_acts_on_the_output_alone_and_in_training_only(prior):
    mixer = make_mixer(prior, dropout=0.5)
    x = tokens(2, 40)
    quiet = mixer(x)
    assert torch.equal(quiet, mixer(x))
    noisy = mixer.train()(x)
    dropped = noisy == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(noisy[~dropped], 2 * quiet[~dropped])


@every_prior
def test_a_new_mixer_reaches_every_parameter_once_its_conditioning_output_is_not_zero(prior):
    torch.manual_seed(0)
    mixer = FreeEnergyMixer(mixer_config(prior, bias=True))
    assert (mixer.tdc.out_proj.weight == 0).all()
    nn.init.normal_(mixer.tdc.out_proj.weight, std=0.02)
    mixer(tokens(2, 30)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
        assert parameter.ndim > 0, name


@every_prior
def test_the_initial_gates_and_temperature(prior):
    torch.manual_seed(0)
    mixer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=512, n_heads=8, prior=prior))
    torch.testing.assert_close(mixer.beta_max, torch.full((8, 32), math.log1p(math.exp(1.8)) + 1e-6))
    for name, parameter in mixer.named_parameters():
        if name.startswith(("in_proj", "o_proj", "tdc.in_proj.weight")):
            fan_in = 256 if name.startswith("o_proj") else 512
            assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03), name
    x = torch.randn(1, 64, 512)
    with initializer_range(0.02):
        small = FreeEnergyMixer(mixer.config)
    for started, deviation in ((mixer, 0.132), (small, 0.108)):  # the gates' logits: 3^(-1/2), 0.02 sqrt(512)
        inner = started.project(x, sequence_layout(x))[0]["inner"].sigmoid()
        assert abs(inner.mean() - 0.5) < 0.01 and abs(inner.std() - deviation) < 0.01


@every_prior
def test_the_memory_of_linear_time_priors_is_linear(prior):
    """Elements that autograd keeps for backward, at two lengths."""

    def saved(time):
        count, seen = 0, set()

        def pack(x):
            nonlocal count
            key = (x.untyped_storage().data_ptr(), x._version)
            if key not in seen:
                seen.add(key)
                count += x.untyped_storage().nbytes()
            return x

        mixer = make_mixer(prior)
        parameters = sum(p.numel() * 4 for p in mixer.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = mixer(tokens(1, time))
        del y
        return count - parameters

    short, long = saved(512), saved(2048)
    assert long < 4.4 * short
    assert long / 2048 < 200 * WIDTH  # bytes per token: no T x T, no K x V per token


# ---- options


CHANGES = {
    "n_kv_heads": ("softmax", {"n_kv_heads": 1}),
    "d_head": ("softmax", {"d_head": 8}),
    "d_head_v": ("softmax", {"d_head_v": 6}),
    "read free energy": ("softmax", {"read": "free_energy"}),
    "read mean": ("softmax", {"read": "mean"}),
    "outer_gate": ("softmax", {"outer_gate": False}),
    "tdc_width": ("softmax", {"tdc_width": 0}),
    "tdc_bidirectional": ("softmax", {"tdc_bidirectional": True, "causal": False}),
    "tdc_norm_first": ("softmax", {"tdc_norm_first": False}),
    "bias": ("softmax", {"bias": True}),
    "cap": ("softmax", {"cap": 0.3}),
    "eps": ("softmax", {"eps": 0.1}),
    "theta_init": ("softmax", {"theta_init": 3.0}),
    "decay": ("gla", {"decay": "channel"}),
    "d_state": ("mamba", {"d_state": 3}),
    "normalize": ("mamba", {"normalize": False, "read": "mean"}),
    **{f"causal, {prior}": (prior, {"causal": False}) for prior in PRIORS},
    **{f"rope_theta, {prior}": (prior, {"rope_theta": 0.0}) for prior in PRIORS if prior != "mamba"},
    **{f"base of rope_theta, {prior}": (prior, {"rope_theta": 50.0}) for prior in PRIORS if prior != "mamba"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_option_changes_the_output(change):
    prior, options = CHANGES[change]
    before = {k: v for k, v in options.items() if k == "read" or (k == "causal" and "tdc" in change)}
    if change.startswith("read"):
        before = {}
    x = tokens(2, 12)
    usual, changed = make_mixer(prior, **before), make_mixer(prior, **options)
    shared = {k: v for k, v in usual.state_dict().items() if v.shape == changed.state_dict().get(k, x).shape}
    if change != "theta_init":
        changed.load_state_dict(shared, strict=False)
    assert difference(changed(x), usual(x)) > 1e-3


def test_every_field_of_the_config_is_covered_above():
    fields = {field.name for field in dataclasses.fields(FreeEnergyMixerConfig)}
    covered = {name.split(",")[0].split()[-1] for name in CHANGES} | {name.split()[0] for name in CHANGES}
    elsewhere = {"kind", "d_model", "n_heads", "prior", "dropout", "backend"}
    assert fields <= covered | elsewhere


@every_prior
def test_backends_share_their_parameters(prior):
    """A checkpoint of one loads into the other, and the complete torch path is what runs on a CPU."""
    names = {"softmax": "flash_attn", "linear": "fla", "gla": "fla"}
    auto, torch_only = make_mixer(prior), make_mixer(prior, backend="torch")
    torch_only.load_state_dict(auto.state_dict())
    x = tokens(2, 9)
    assert torch.equal(auto(x), torch_only(x))
    if prior in names:
        named = make_mixer(prior, backend=names[prior])
        assert {k: v.shape for k, v in named.state_dict().items()} == {
            k: v.shape for k, v in auto.state_dict().items()
        }
        with pytest.raises(ValueError, match=f"{names[prior]}.*CUDA"):
            named(x)
