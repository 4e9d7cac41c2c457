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
from helmholtz.ops.causal_conv import causal_conv
from helmholtz.ops.code_usage import CodeUsage, code_probabilities, code_usage
from helmholtz.ops.free_energy import (
    free_energy_from_mixed,
    free_energy_read,
    hidden_temperature,
    posterior,
    tilt_values,
)
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.hopfield import (
    hopfield_energy,
    hopfield_potential,
    hopfield_retrieve,
    hopfield_weights,
    pattern_margins,
    retrieval_margin,
)
from helmholtz.ops.linear_attention import linear_attention, recurrent_linear_attention
from helmholtz.ops.losses import cross_entropy
from helmholtz.ops.masked_free_energy import masked_free_energy
from helmholtz.ops.modulate import modulated_split
from helmholtz.ops.rms_norm import rms_norm
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.rope import rope
from helmholtz.ops.scan import first_order_scan, leaky_scan
from helmholtz.ops.selective_scan import selective_scan
from helmholtz.ops.spectral import spectral_norm_bound
from helmholtz.ops.ssd import ssd
from helmholtz.ops.swiglu import swiglu
from helmholtz.ops.token_energy import (
    EnergyComponents,
    EnergyParameters,
    TokenField,
    TokenJacobian,
    contraction_certificate,
    energy_components,
    token_energy,
    token_jacobian,
    token_jvp,
    token_map,
    token_map_and_energy,
)

__all__ = [
    "CodeUsage",
    "EnergyComponents",
    "EnergyParameters",
    "RNNSoftmaxState",
    "TokenField",
    "TokenJacobian",
    "bits_to_code",
    "bits_to_nats",
    "causal_conv",
    "code_log_probability",
    "code_lookup",
    "code_probabilities",
    "code_to_bits",
    "code_usage",
    "contraction_certificate",
    "cross_entropy",
    "energy_components",
    "first_order_scan",
    "free_bits",
    "free_energy_from_mixed",
    "free_energy_read",
    "gated_read",
    "hidden_temperature",
    "hopfield_energy",
    "hopfield_potential",
    "hopfield_retrieve",
    "hopfield_weights",
    "kl_per_bit",
    "kl_per_token",
    "leaky_scan",
    "linear_attention",
    "masked_free_energy",
    "modulated_split",
    "posterior",
    "recurrent_linear_attention",
    "pattern_margins",
    "retrieval_margin",
    "rms_norm",
    "rnn_softmax",
    "rope",
    "sample_bits",
    "selective_scan",
    "softmax_attention",
    "spectral_norm_bound",
    "ssd",
    "swiglu",
    "tilt_values",
    "token_energy",
    "token_jacobian",
    "token_jvp",
    "token_map",
    "token_map_and_energy",
]
