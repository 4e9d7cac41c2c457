"""Pure functions on tensors: no modules, no configuration, no randomness without a generator."""

from helmholtz.ops.linear_attention import linear_attention, recurrent_linear_attention
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.scan import first_order_scan
from helmholtz.ops.selective_scan import selective_scan

__all__ = [
    "RNNSoftmaxState",
    "first_order_scan",
    "linear_attention",
    "recurrent_linear_attention",
    "rnn_softmax",
    "selective_scan",
]
