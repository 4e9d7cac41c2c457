"""Pure functions on tensors: no modules, no configuration, no randomness without a generator."""

from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.binary_latent import (
    bits_to_code,
    bits_to_nats,
    code_log_probability,
    code_lookup,
    code_to_bits,
    free_bits,
    kl_per_bit,
    kl_per_token,
    sample_bits,
)
from helmholtz.ops.code_usage import CodeUsage, code_probabilities, code_usage
from helmholtz.ops.free_energy import (
    free_energy_from_mixed,
    free_energy_read,
    hidden_temperature,
    posterior,
    tilt_values,
)
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.linear_attention import linear_attention, recurrent_linear_attention
from helmholtz.ops.losses import cross_entropy
from helmholtz.ops.modulation import modulated_linear
from helmholtz.ops.rms_norm import rms_norm
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.rope import rope
from helmholtz.ops.scan import first_order_scan
from helmholtz.ops.selective_scan import selective_scan
from helmholtz.ops.swiglu import swiglu

__all__ = [
    "CodeUsage",
    "RNNSoftmaxState",
    "bits_to_code",
    "bits_to_nats",
    "code_log_probability",
    "code_lookup",
    "code_probabilities",
    "code_to_bits",
    "code_usage",
    "cross_entropy",
    "first_order_scan",
    "free_bits",
    "free_energy_from_mixed",
    "free_energy_read",
    "gated_read",
    "hidden_temperature",
    "kl_per_bit",
    "kl_per_token",
    "linear_attention",
    "modulated_linear",
    "posterior",
    "recurrent_linear_attention",
    "rms_norm",
    "rnn_softmax",
    "rope",
    "sample_bits",
    "selective_scan",
    "softmax_attention",
    "swiglu",
    "tilt_values",
]
