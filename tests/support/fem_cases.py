"""Small mixers of every prior with every parameter at work, and the differences that tests allow them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig
from helmholtz.layers.priors.base import Tilt

LINEAR_TIME_PRIORS = [prior for prior in PRIORS if prior != "softmax"]
"""Priors whose decode state has a constant size."""

WIDTH = 24
"""Model width of the mixers below."""


def mixer_config(prior: str, **options: Any) -> FreeEnergyMixerConfig:
    """Odd sizes that every prior takes: 3 heads, 4 value channels each, 6 key channels where they may differ."""
    sizes: dict[str, Any] = {"d_model": WIDTH, "n_heads": 3, "d_head_v": 4, "tdc_width": 6}
    if prior not in ("rnn_softmax", "mamba"):
        sizes["d_head"] = 6
    if prior == "mamba":
        sizes["d_state"] = 5
    return FreeEnergyMixerConfig(prior=prior, **{**sizes, **options})


def make_mixer(prior: str, *, seed: int = 0, **options: Any) -> FreeEnergyMixer:
    """In evaluation mode, every parameter shaken so that no gate, bias or conditioning is idle; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixer = FreeEnergyMixer(mixer_config(prior, **options)).eval()
    return stir(mixer, seed=seed)


def stir(mixer: FreeEnergyMixer, *, seed: int = 0, scale: float = 0.4) -> FreeEnergyMixer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return mixer


def tokens(batch: int, time: int, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected; NaN never is small."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.detach().double().abs().max().item()
    error = (actual.detach().double() - expected.detach().double()).abs().max().item()
    return float("inf") if error != error else error / max(scale, 1e-30)


def prior_features(mixer: FreeEnergyMixer, batch: int, time: int, *, seed: int = 2) -> dict[str, Tensor]:
    """Random pre-activations in float64 for the prior of ``mixer``."""
    generator = torch.Generator().manual_seed(seed)
    widths = {**mixer.prior.query_widths, **mixer.prior.key_widths}
    return {
        name: torch.randn(batch, time, width, generator=generator, dtype=torch.float64)
        for name, width in widths.items()
    }


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


class Given(Tilt):
    """Signals that are given, whatever the values are."""

    def __init__(self, signals):
        super().__init__(beta=None, cap=40.0)
        object.__setattr__(self, "signals", signals)

    def __call__(self, values, *, signals_first=False):
        return self.signals
