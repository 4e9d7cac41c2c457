"""The encoder of the plan, in the original names."""

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.latent import LatentEncoder
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout


class EncoderBlock(nn.Module):
    """Bit logits of every token from the whole context. With rotary positions: the original has none, and gives all
    tokens the same logits."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, latent_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        attention = Attention(dim, num_heads, causal=False)
        block = Block(attention, SwiGLU(dim, ffn_dim), dim, dropout=dropout)
        self.dim, self.num_heads, self.head_dim, self.latent_dim = (
            dim,
            num_heads,
            dim // num_heads,
            latent_dim,
        )
        self.encoder = LatentEncoder(block, dim, latent_dim, norm_eps=1e-6)
        self.encoder.query = nn.Parameter(self.encoder.query.detach().view(1, 1, dim))  # the original's shape
        self.register_load_state_dict_pre_hook(_reshape_query)

    @property
    def zeta(self) -> nn.Parameter:
        """The learned query, ``encoder.query``."""
        return self.encoder.query

    @property
    def readout(self) -> nn.Linear:
        """From the width to the bits, ``encoder.readout``."""
        return self.encoder.readout

    def forward(self, context: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        return self.encoder(context, sequence_layout(context))


def _reshape_query(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """State dictionaries written when the query was a row."""
    name = f"{prefix}encoder.query"
    if name in state:
        state[name] = state[name].view(1, 1, -1)
