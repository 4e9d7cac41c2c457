"""The models of the studies begin, at 0.02, as they did when the committed results were computed."""

import pytest
import torch

from helmholtz.experiments.forecasting.models import EncoderForecaster, ForecasterConfig
from helmholtz.experiments.mad.models import MODELS, build_model
from helmholtz.experiments.vision.models import ViT, ViTConfig
from helmholtz.layers.init import initializer_range
from mad_cases import RECALL, SIZES, SQUEEZE


def mad(name, setting):
    model = build_model(name, setting.task, SIZES, seed=3, initialization="normal_0.02")
    tokens = torch.arange(setting.task.n_tokens).expand(2, -1) * torch.tensor([[1], [3]]) % 8
    return model(tokens).logits


def vit(mixer):
    torch.manual_seed(3)
    with initializer_range(0.02):
        model = ViT(ViTConfig(image_size=8, patch_size=2, n_classes=3, mixer=mixer)).eval()
    return model(torch.linspace(-1, 1, 128).reshape(2, 8, 8))


def forecaster(mixer, axis):
    torch.manual_seed(3)
    with initializer_range(0.02):
        model = EncoderForecaster(ForecasterConfig(look_back=32, horizon=5, axis=axis, mixer=mixer)).eval()
    return model(torch.arange(192.0).square().reshape(2, 32, 3).sin())


CASES = {
    **{f"mad {name} recall": (mad, name, RECALL) for name in MODELS},
    **{f"mad {name} compression": (mad, name, SQUEEZE) for name in MODELS},
    **{f"vit {mixer}": (vit, mixer) for mixer in ("attention", "fem")},
    **{
        f"forecaster {mixer} {axis}": (forecaster, mixer, axis)
        for mixer in ("attention", "fem")
        for axis in ("variates", "time")
    },
}


def weighted_sum(name):
    make, *arguments = CASES[name]
    with torch.no_grad():
        y = make(*arguments).double().flatten()
    return (y * torch.arange(1, len(y) + 1).sin()).sum().item()


EXPECTED = {
    "mad attention recall": 2.524345,
    "mad fem_softmax recall": 5.367874,
    "mad fem_gla recall": -4.971465,
    "mad fem_softmax_clt recall": -3.569228,
    "mad fem_softmax_cl recall": -7.716552,
    "mad fem_softmax_c recall": -7.606609,
    "mad fem_softmax_mean recall": 8.582106,
    "mad fem_linear recall": 4.826633,
    "mad fem_rnn_softmax recall": -7.663921,
    "mad fem_mamba recall": 0.898636,
    "mad mamba recall": 3.812353,
    "mad mamba_hopfield recall": 5.045144,
    "mad attention compression": 0.097942,
    "mad fem_softmax compression": 0.034836,
    "mad fem_gla compression": -0.068311,
    "mad fem_softmax_clt compression": 0.043000,
    "mad fem_softmax_cl compression": 0.039194,
    "mad fem_softmax_c compression": 0.039050,
    "mad fem_softmax_mean compression": -0.325517,
    "mad fem_linear compression": 0.034723,
    "mad fem_rnn_softmax compression": 0.039302,
    "mad fem_mamba compression": 0.036342,
    "mad mamba compression": 0.325956,
    "mad mamba_hopfield compression": 0.123172,
    "vit attention": -0.037067,
    "vit fem": 0.305800,
    "forecaster attention variates": 0.335367,
    "forecaster attention time": 0.483134,
    "forecaster fem variates": 0.226362,
    "forecaster fem time": -0.787296,
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_at_the_start(name):
    assert weighted_sum(name) == pytest.approx(EXPECTED[name], abs=2e-5)
