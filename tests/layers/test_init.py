"""Every weight's variance at the start, at widths of 64 to 2,048: by fan-in, or by a rule of its own, named here."""

import math

import pytest
import torch
from torch import nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig
from helmholtz.layers.init import init_normal, initializer_range, scale_residual
from helmholtz.layers.latent import BitsPostSampler, LatentEncoder, TablePostSampler
from helmholtz.layers.mamba import MambaCell, MambaMixer
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout

WIDTHS = (64, 128, 512, 2048)
N_HEADS, BITS = 2, 9


def fem(prior, **options):
    def make(d):
        widths = {"n_heads": N_HEADS, "d_head_v": 12, "tdc_width": 10}
        if prior in ("softmax", "linear", "gla"):
            widths["d_head"] = 16
        return FreeEnergyMixer(FreeEnergyMixerConfig(d_model=d, prior=prior, **widths, **options))

    return make


def encoder(d):
    return LatentEncoder(Block(Attention(d, N_HEADS, causal=False), SwiGLU(d, 24), d), d, BITS, norm_eps=1e-6)


MODULES = {
    "attention": lambda d: Attention(d, N_HEADS),
    "swiglu": lambda d: SwiGLU(d, 24),
    **{f"fem-{prior}": fem(prior) for prior in PRIORS},
    "fem-bidirectional": fem("softmax", causal=False, tdc_bidirectional=True, bias=True),
    "mamba": lambda d: MambaMixer(d, d_inner=64, d_state=8, d_head=32),
    "mamba-cell": lambda d: MambaCell(d, d_inner=64, d_state=8, d_head=32),
    "equilibrium": lambda d: EquilibriumLayer(EquilibriumConfig(d_model=d, d_inner=48, d_state=8, d_head=24)),
    "encoder": encoder,
    "table": lambda d: TablePostSampler(BITS, d),
    "bits": lambda d: BitsPostSampler(BITS, d),
    "embedding": lambda d: nn.Sequential(nn.Embedding(40, d)),
}
MIXERS = [name for name in MODULES if name.startswith(("attention", "fem", "mamba")) and name != "mamba-cell"]


def built(name, d):
    torch.manual_seed(0)
    module = MODULES[name](d)
    if name == "embedding":
        init_normal(module)
    return module


def own_rule(name, parameter, d):
    """Deviations of parts of a matrix that does not go by its fan-in: ``(rows, deviation)``; None: it does."""
    if name == "tdc.out_proj.weight":
        return [(parameter, 0.0)]
    if name.endswith("memory_patterns"):
        return [(parameter, 1.0)]
    if name in ("dynamics.u_proj.weight", "dynamics.start_proj.weight"):
        return [(parameter, d**-0.75)]
    if name == "dynamics.weight":
        return [(parameter, 1 / (math.sqrt(len(parameter)) + math.sqrt(d)))]
    if name.endswith("conv_weight"):
        return [(parameter, (3 * parameter.shape[1]) ** -0.5)]
    if name == "query" or (name == "weight" and len(parameter) == 2**BITS):
        return [(parameter, (3 * d) ** -0.5)]
    return None


def mamba_rows(parameter, d):
    """All but the step sizes' rows, and these."""
    return [(parameter[:-N_HEADS], d**-0.5), (parameter[-N_HEADS:], (3 * d) ** -0.5)]


def parts(name, module, d):
    """``(parameter's name, rows, deviation)`` of everything that is drawn."""
    by_module = {f"{prefix}.weight".lstrip("."): child for prefix, child in module.named_modules()}
    for path, parameter in module.named_parameters():
        child = by_module.get(path)
        rule = own_rule(path, parameter, d)
        if name == "bits":
            rule = [(parameter, (3 * BITS * d) ** -0.5)]
        if path.endswith("in_proj.weight") and isinstance(module, MambaMixer | MambaCell | EquilibriumLayer):
            rule = mamba_rows(parameter, d)
        if rule is None and isinstance(child, nn.Linear | nn.Embedding):
            rule = [(parameter, (3 * parameter.shape[1]) ** -0.5)]
        if rule is None:
            vectors = ("bias", "theta", "A_log", "D", "A_raw", "D_raw", "step_sizes")
            assert parameter.ndim == 1 or path.split(".")[-1] in vectors, f"{path}: drawn by no rule"
        for rows, deviation in rule or []:
            yield path, rows.detach(), deviation


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("name", MODULES)
def test_every_matrix_starts_with_the_variance_of_its_rule(name, d):
    module = built(name, d)
    found = list(parts(name, module, d))
    assert found
    for path, rows, deviation in found:
        error = 5 / math.sqrt(2 * rows.numel())
        assert rows.std().item() == pytest.approx(deviation, rel=error), path
        assert abs(rows.mean().item()) <= 5 * deviation / math.sqrt(rows.numel()), path
    for child in module.modules():
        if isinstance(child, nn.Linear) and child.bias is not None:
            assert (child.bias == 0).all()


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("name", MIXERS)
def test_what_a_mixer_projects_has_one_scale_at_every_width(name, d):
    module, x = built(name, d), torch.nn.functional.normalize(torch.randn(1, 64, d), dim=-1) * d**0.5
    with torch.no_grad():
        if name.startswith("fem"):
            signals = module.project(x, sequence_layout(x))[0]
        elif name == "mamba":
            gate, signal, step = module._project(x)
            taps = signal.transpose(1, 2).unfold(-1, 4, 1)
            signals = {"convolved": torch.einsum("bctk,ck->bct", taps, module.conv_weight), "step": step}
        else:
            signals = {"joint": module.in_proj(x)}
    for part, signal in signals.items():
        assert signal.std().item() == pytest.approx(3**-0.5, rel=0.2), part


@pytest.mark.parametrize("name", MODULES)
def test_a_constant_takes_the_place_of_the_fan_in(name):
    """From the same random numbers, and nothing else changes."""
    plain = built(name, 64)
    with initializer_range(0.02):
        constant = built(name, 64)
    with initializer_range(0.02), initializer_range(None):
        inherited = built(name, 64)
    assert all(torch.equal(a, b) for a, b in zip(constant.parameters(), inherited.parameters(), strict=True))
    own = ("memory_patterns", "u_proj.weight", "start_proj.weight", "dynamics.weight", "conv_weight")
    pairs = zip(parts(name, constant, 64), parts(name, plain, 64), strict=True)
    for (path, rows, deviation), (_, by_fan_in, _) in pairs:
        is_kept = deviation in (0, 64**-0.5) or path.endswith(own)  # 64^(-1/2): the input projection of Mamba
        expected = by_fan_in if is_kept else by_fan_in * (0.02 / deviation)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-9, msg=path)


def test_the_context_ends_with_an_error_too():
    with pytest.raises(KeyError), initializer_range(0.02):
        raise KeyError
    torch.manual_seed(0)
    assert SwiGLU(64, 64).down_proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


@pytest.mark.parametrize("name", MODULES)
def test_the_meta_device_draws_nothing(name):
    torch.manual_seed(0)
    with torch.device("meta"):
        module = MODULES[name](64)
        init_normal(module)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_torch_s_own_linear_map_has_the_same_variance():
    linear = nn.Linear(512, 300)
    drawn = linear.weight.std().item()
    init_normal(linear)
    assert linear.weight.std().item() == pytest.approx(drawn, rel=0.02)


def test_the_last_layer_of_a_deep_stream_is_as_large_as_that_of_a_shallow_one():
    x = torch.randn(1000, 64)
    for n in (2, 32):
        writers = [nn.Linear(64, 64, bias=False) for _ in range(n)]
        for writer in writers:
            init_normal(writer)
        scale_residual(writers)
        stream = sum(writer(x) for writer in writers)
        assert stream.std().item() == pytest.approx(3**-0.5, rel=0.1)
