"""The encoder of the plan, in the original names."""

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz.layers.attention import Attention
from helmholtz.layers.latent import LatentEncoder, SourceBlock
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout


class EncoderBlock(nn.Module):
    """Bit logits of every token from the whole context. With rotary positions: the original has none, and gives all
    tokens the same logits."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, latent_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        attention = Attention(dim, num_heads, causal=False)
        block = SourceBlock(attention, SwiGLU(dim, ffn_dim), dim, dropout=dropout)
        self.encoder = LatentEncoder(block, dim, latent_dim, norm_eps=1e-6)

    def forward(self, context: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        return self.encoder(context, sequence_layout(context))
