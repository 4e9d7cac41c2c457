"""The map itself, iterated."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from helmholtz.solvers.loop import AbstractRule, Point, Rows


@dataclass(frozen=True, slots=True)
class Picard(AbstractRule):
    r""":math:`z \leftarrow z + \tau (f(z) - z)`.

    The energy falls by at least :math:`\tau (1 - \tau/2) |f(z) - z|^2` for :math:`0 < \tau < 2`.
    """

    damping: float

    def propose(self, rows: Rows, point: Point, step: int) -> Float[Tensor, "n D"]:
        return descent_step(point, self.damping)

    def is_guarded(self, step: int) -> bool:
        return False


def descent_step(point: Point, damping: float) -> Float[Tensor, "n D"]:
    """Gradient descent by ``damping``; at 1 it is the fixed-point step itself."""
    return point.f if damping == 1 else point.z + damping * (point.f - point.z)
