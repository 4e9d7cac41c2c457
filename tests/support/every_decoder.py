"""Small decoders of every kind, with weights large enough that every part matters."""

from collections.abc import Callable

from decoder_cases import SIZES
from helmholtz.layers.fem_config import PRIORS
from helmholtz.models.decoder import Decoder
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig, MixerOptions
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.mamba import Mamba, MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.solvers import SolverConfig
from hybrid_cases import hybrid_config


def _transformer(**fields: object) -> Callable[[], Decoder]:
    return lambda: Transformer(TransformerConfig(**SIZES, **fields))


def _fem(**fields: object) -> Callable[[], Decoder]:
    options = MixerOptions(tdc_width=8)  # a layer norm over the default 2 channels would only keep signs
    return lambda: FEMLM(FEMLMConfig(**SIZES, mixer=options, d_ff=80, **fields))


def _free(**fields: object) -> Callable[[], Decoder]:
    return lambda: FreeTransformer(FreeTransformerConfig(**SIZES, n_latent_bits=5, **fields))


def _mamba(**fields: object) -> Callable[[], Decoder]:
    sizes = {name: SIZES[name] for name in ("vocab_size", "d_model", "n_layers", "max_seq_len")}
    return lambda: Mamba(MambaConfig(**sizes, d_state=8, d_head=16, **fields))


def _mamba_hopfield(**fields: object) -> Callable[[], Decoder]:
    sizes = {name: SIZES[name] for name in ("vocab_size", "d_model", "n_layers", "max_seq_len")}
    solver = SolverConfig(max_steps=100, rtol=1e-6, energy_rtol=1e-6)
    return lambda: MambaHopfield(
        MambaHopfieldConfig(**sizes, d_state=8, d_head=16, n_patterns=16, solver=solver, **fields)
    )


DECODERS: dict[str, Callable[[], Decoder]] = {
    "transformer": _transformer(),
    "transformer-gqa-untied": _transformer(n_kv_heads=2, tie_embeddings=False),
    "fem-hybrid": _fem(prior=("gla", "softmax"), n_kv_heads=2, tie_embeddings=False),
    "free": _free(),
    "free-bits-gqa-untied": _free(post_sampler="bits", n_kv_heads=2, tie_embeddings=False),
    "mamba": _mamba(),
    "mamba-narrow-untied": _mamba(d_inner=48, d_conv=2, tie_embeddings=False),
    "mamba-hopfield": _mamba_hopfield(),
    # warm enough for one attractor per token: which of several is reached may change with a rounding
    "mamba-hopfield-descent-untied": _mamba_hopfield(
        stability="descent", beta=0.2, n_slots=8, tie_embeddings=False
    ),
    **{f"fem-{prior}": _fem(prior=prior) for prior in PRIORS},
    "hybrid": lambda: Decoder(hybrid_config("mixed", "middle", "equilibrium")),
    "hybrid-fem-untied": lambda: Decoder(hybrid_config("fem-gla", "first", "plain", tie_embeddings=False)),
    "hybrid-mamba": lambda: Decoder(hybrid_config("mamba", "last", "plain")),
}
