"""The largest eigenvalue of a map's Jacobian at a point: how much the map stretches there."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check_integer
from helmholtz.solvers.base import AbstractProblem
from helmholtz.solvers.loop import Rows


@torch.no_grad()
def top_eigenvector(
    problem: AbstractProblem, z: Float[Tensor, "N D"], *, steps: int, generator: torch.Generator
) -> Float[Tensor, "N D"]:
    r"""Power iteration on the symmetric Jacobian, per row, from one random vector for all rows.

    A row's result depends on no other row, but for the rounding of a matrix product.

    Args:
        steps: products with the Jacobian. :math:`v^\top J v` is never above the largest eigenvalue and close below it
            after some dozens.
        generator: on the CPU, wherever ``z`` is.

    Returns: unit vectors; a row whose Jacobian is 0 keeps the random one.
    """
    check_integer("steps", steps, minimum=0)
    start = torch.randn(z.shape[-1], generator=generator, dtype=torch.float64)
    v = F.normalize(start, dim=-1).to(z).repeat(len(z), 1)
    jacobian = problem.jacobian(z)
    for _ in range(steps):
        product = jacobian.product(v)
        v = F.normalize(torch.where(product.any(dim=-1, keepdim=True), product, v), dim=-1)
    return v


def local_lipschitz(
    problem: AbstractProblem, z: Float[Tensor, "N D"], *, steps: int, generator: torch.Generator
) -> Float[Tensor, "N"]:
    r"""The map's Lipschitz constant at ``z``, :math:`v^\top J(z) v \le |J(z)|_2` with ``v`` of ``top_eigenvector``.

    Differentiable in what the problem was built from; ``v`` counts as constant, as it may at an eigenvector
    (Hellmann and Feynman).
    """
    v = top_eigenvector(problem, z, steps=steps, generator=generator)
    return (v * Rows.of(problem, z).jvp(z, v)).sum(-1)
