"""The feed-forward half of a block."""

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz.layers.init import init_normal
from helmholtz.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    r"""Gated feed-forward: :math:`W_{down}(\mathrm{silu}(W_{gate} x) \odot W_{up} x)`.

    Without biases: 0 goes to 0, so a pad stays 0. ``3 D d_ff`` parameters; gate and up are one product.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        init_normal(self)

    def forward(self, x: Float[Tensor, "*BT D"]) -> Float[Tensor, "*BT D"]:
        return self.down_proj(swiglu(self.gate_up_proj(x)))
