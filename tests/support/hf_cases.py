"""Small models of every architecture behind the interface of transformers."""

from collections.abc import Callable

import torch

from decoder_cases import SIZES, liven
from helmholtz.interop.hf import HelmholtzForCausalLM
from helmholtz.layers.fem_config import PRIORS
from helmholtz.models import MODELS
from helmholtz.models.decoder import Decoder
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig, MixerOptions
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.mamba import Mamba, MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.solvers import SolverConfig
from hybrid_cases import hybrid, hybrid_config

PLAIN = {name: SIZES[name] for name in ("vocab_size", "d_model", "n_layers", "max_seq_len")}
RECURRENT = PLAIN | {"d_state": 8, "d_head": 16}
SOLVER = SolverConfig(max_steps=100, rtol=1e-5, energy_rtol=1e-5)


def _fem(**fields: object) -> FEMLM:
    # a layer norm over the default 2 channels would only keep signs
    return FEMLM(FEMLMConfig(**SIZES, mixer=MixerOptions(tdc_width=8), d_ff=80, **fields))


def _hopfield(**fields: object) -> MambaHopfield:
    return MambaHopfield(MambaHopfieldConfig(**RECURRENT, n_patterns=16, solver=SOLVER, **fields))


def _with_written_slots() -> MambaHopfield:
    model = _hopfield(n_slots=8, tie_embeddings=False)
    model.memory.write(torch.randn(5, SIZES["d_model"]))
    return model


CORES: dict[str, Callable[[], Decoder]] = {
    "transformer": lambda: Transformer(TransformerConfig(**SIZES)),
    "transformer-gqa-untied": lambda: Transformer(
        TransformerConfig(**SIZES, n_kv_heads=2, tie_embeddings=False)
    ),
    "fem-hybrid-untied": lambda: _fem(prior=("gla", "softmax"), n_kv_heads=2, tie_embeddings=False),
    "free": lambda: FreeTransformer(FreeTransformerConfig(**SIZES, n_latent_bits=5)),
    "free-bits-untied": lambda: FreeTransformer(
        FreeTransformerConfig(**SIZES, n_latent_bits=3, post_sampler="bits", tie_embeddings=False)
    ),
    "mamba": lambda: Mamba(MambaConfig(**RECURRENT)),
    "mamba-hopfield": _hopfield,
    "mamba-hopfield-slots-untied": _with_written_slots,
    **{f"fem-{prior}": (lambda prior=prior: _fem(prior=prior)) for prior in PRIORS},
    "hybrid": lambda: Decoder(hybrid_config("mixed", "middle", "equilibrium")),
}
ONE_OF_EACH = ["transformer", "fem-hybrid-untied", "free", "mamba", "mamba-hopfield", "hybrid"]
WITHOUT_PLAN = [name for name, core in CORES.items() if core().plan is None]
STREAMS = [name for name in CORES if "slots" not in name]
"""Those whose streams differ: what is written into a memory changes between calls only."""


def make(name: str, seed: int = 1) -> HelmholtzForCausalLM:
    """The case ``name`` with weights large enough that every part matters, in evaluation mode."""
    torch.manual_seed(seed)
    return HelmholtzForCausalLM.of(liven(CORES[name]()))


def of_architecture(name: str, seed: int = 1, **fields: object) -> HelmholtzForCausalLM:
    """A small model of an architecture of ``MODELS``, whichever it is, in evaluation mode."""
    torch.manual_seed(seed)
    kind = MODELS[name]
    if kind is Decoder:
        layers = hybrid_config("mixed", "no plan", "equilibrium").layers[:2]
        return HelmholtzForCausalLM.of(
            hybrid("mixed", "no plan", "equilibrium", seed, layers=layers, **fields)
        )
    return HelmholtzForCausalLM.of(liven(kind(kind.config_class(**PLAIN | fields))))
