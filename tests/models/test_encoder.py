"""The encoder's two mixers hold equal parameters; attention is attention; a set has no order, a sequence has one."""

import inspect

import pytest
import torch

from fem_cases import stir
from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.models.encoder import Encoder, EncoderConfig


def encoder(mixer, order, **sizes):
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 64} | sizes
    return stir(Encoder(EncoderConfig(mixer=mixer, **sizes), order).double().eval(), scale=0.2)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("order", ["none", "given", "rotary"])
@pytest.mark.parametrize("sizes", [{"d_model": 64, "n_heads": 4, "d_ff": 128}, {"d_model": 96, "n_heads": 3}])
def test_both_mixers_hold_equal_parameters(order, sizes):
    attention, fem = (count(encoder(mixer, order, **sizes)) for mixer in ("attention", "fem"))
    assert abs(fem - attention) <= 0.01 * attention
    width, n_layers = sizes["d_model"], 2
    norms = (2 * n_layers + 1) * width
    assert attention == n_layers * (4 * width**2 + 3 * width * sizes.get("d_ff", 64)) + norms


def test_attention_is_the_attention_of_the_decoders_without_their_mask():
    config = EncoderConfig(mixer="attention", d_model=16, n_heads=2)
    mixer, attention = FreeEnergyMixer(config.mixer_config("rotary")), Attention(16, 2, causal=False)
    attention.load_state_dict(mixer.state_dict())
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(mixer(x), attention(x))


@pytest.mark.parametrize("mixer", ["attention", "fem"])
def test_a_set_is_mixed_alike_in_every_order_and_a_sequence_is_not(mixer):
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    order = torch.randperm(9)
    for name, equivariant in (("none", True), ("rotary", False)):
        model = encoder(mixer, name)
        difference = (model(x[:, order]) - model(x)[:, order]).abs().max()
        assert (difference < 1e-10) == equivariant, name


def test_fem_of_given_positions_still_scans_and_attention_does_not():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    found = {}
    for mixer in ("attention", "fem"):
        model = encoder(mixer, "given")
        found[mixer] = (model(x.flip(1)) - model(x).flip(1)).abs().max()
    assert found["attention"] < 1e-10 < 1e-3 < found["fem"]


@pytest.mark.parametrize("mixer", ["attention", "fem"])
@pytest.mark.parametrize("order", ["none", "given", "rotary"])
def test_every_token_sees_every_other_one(mixer, order):
    model = encoder(mixer, order, n_layers=1)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    seen = torch.autograd.functional.jacobian(lambda x: model(x)[0].sum(-1), x)[:, 0].abs().sum(-1)
    assert (seen > 1e-9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "mamba"}, r"mixer must be one of \['attention', 'fem'\], got 'mamba'"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"n_heads": 16, "d_model": 16}, "d_model / n_heads must be even, got 1"),
        ({"d_ff": 0}, "d_ff must be an integer of at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    config = EncoderConfig(mixer="fem")
    for (
        name,
        value,
    ) in options.items():  # the shape checks of the tests would refuse a wrong word before we can
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_an_unknown_order_is_refused():
    unchecked = inspect.unwrap(
        EncoderConfig.mixer_config
    )  # the shape checks would refuse the word before we can
    with pytest.raises(ValueError, match="order must be one of .* did you mean 'none'"):
        unchecked(EncoderConfig(mixer="fem"), "nine")
