"""Where the plan enters, in the original names."""

from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check


class InjectionMechanism(nn.Module):
    """What the middle block's keys and values are made of: the context with the plan added."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(
        self, context: Float[Tensor, "B T D"], z_projected: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T D"]:
        width = z_projected.shape[-1]
        check(width == self.hidden_dim, "z_projected", tuple(z_projected.shape), f"{self.hidden_dim} wide")
        return context + z_projected
