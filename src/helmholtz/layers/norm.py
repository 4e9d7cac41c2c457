"""The norm of every block."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz.ops.rms_norm import rms_norm


@final
class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` through ``ops.rms_norm``: the same numbers, a faster backward pass on a CPU."""

    weight: nn.Parameter
    eps: float

    def __init__(self, d_model: int, *, eps: float) -> None:
        super().__init__(d_model, eps=eps)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return rms_norm(x, self.weight, eps=self.eps)
