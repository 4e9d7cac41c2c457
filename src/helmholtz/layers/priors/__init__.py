"""The five priors of the Free Energy Mixer."""

from helmholtz.layers.fem_config import Prior
from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt
from helmholtz.layers.priors.linear import LinearPrior
from helmholtz.layers.priors.mamba import MambaPrior
from helmholtz.layers.priors.rnn_softmax import RNNSoftmaxPrior
from helmholtz.layers.priors.softmax import SoftmaxPrior

__all__ = [
    "PRIOR_CLASSES",
    "AbstractPrior",
    "Features",
    "LinearPrior",
    "MambaPrior",
    "RNNSoftmaxPrior",
    "SoftmaxPrior",
    "Tilt",
]

PRIOR_CLASSES: dict[Prior, type[AbstractPrior]] = {
    "softmax": SoftmaxPrior,
    "linear": LinearPrior,
    "gla": LinearPrior,
    "rnn_softmax": RNNSoftmaxPrior,
    "mamba": MambaPrior,
}
"""By the name in a config; each is built of the whole config, which is complete."""
