"""Language models, by the name that a checkpoint gives its architecture."""

from helmholtz.models.decoder import Decoder
from helmholtz.models.fem_lm import FEMLM
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.mamba import Mamba
from helmholtz.models.mamba_hopfield import MambaHopfield
from helmholtz.models.transformer import Transformer

__all__ = ["FEMLM", "MODELS", "Decoder", "FreeTransformer", "Mamba", "MambaHopfield", "Transformer"]

MODELS: dict[str, type[Decoder]] = {
    "transformer": Transformer,
    "fem_lm": FEMLM,
    "free_transformer": FreeTransformer,
    "mamba": Mamba,
    "mamba_hopfield": MambaHopfield,
    "decoder": Decoder,
}
