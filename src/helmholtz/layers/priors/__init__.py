"""The five priors of the Free Energy Mixer."""

from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt
from helmholtz.layers.priors.linear import LinearPrior
from helmholtz.layers.priors.mamba import MambaPrior
from helmholtz.layers.priors.rnn_softmax import RNNSoftmaxPrior
from helmholtz.layers.priors.softmax import SoftmaxPrior

__all__ = [
    "AbstractPrior",
    "Features",
    "LinearPrior",
    "MambaPrior",
    "RNNSoftmaxPrior",
    "SoftmaxPrior",
    "Tilt",
]
