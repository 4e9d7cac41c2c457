"""Every op once more in float64 loops, written from the equations: what the ops are tested against."""

from helmholtz.reference.binary_latent import (
    bits_to_code,
    code_log_probability,
    code_lookup,
    code_probabilities,
    code_to_bits,
    code_usage,
    free_bits,
    kl_per_bit,
    kl_per_token,
)
from helmholtz.reference.free_energy import (
    free_energy_from_weights,
    free_energy_posterior,
    free_energy_read,
    gated_read,
    modulated_linear,
    rms_norm,
    rope,
    softmax_attention,
    softmax_weights,
    swiglu,
)
from helmholtz.reference.hopfield import (
    hopfield_energy,
    hopfield_potential,
    hopfield_retrieve,
    hopfield_weights,
)
from helmholtz.reference.recurrences import first_order_scan, linear_attention, rnn_softmax, selective_scan
from helmholtz.reference.token_energy import (
    contraction_certificate,
    spectral_norm_bound,
    token_energy,
    token_jvp,
    token_map,
)

__all__ = [
    "bits_to_code",
    "code_log_probability",
    "code_lookup",
    "code_probabilities",
    "code_to_bits",
    "code_usage",
    "contraction_certificate",
    "first_order_scan",
    "free_bits",
    "free_energy_from_weights",
    "free_energy_posterior",
    "free_energy_read",
    "gated_read",
    "hopfield_energy",
    "hopfield_potential",
    "hopfield_retrieve",
    "hopfield_weights",
    "kl_per_bit",
    "kl_per_token",
    "linear_attention",
    "modulated_linear",
    "rms_norm",
    "rnn_softmax",
    "rope",
    "selective_scan",
    "softmax_attention",
    "softmax_weights",
    "spectral_norm_bound",
    "swiglu",
    "token_energy",
    "token_jvp",
    "token_map",
]
