"""The largest eigenvalue of a map's Jacobian at a point: how much the map stretches there."""

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check_integer
from helmholtz.solvers.base import AbstractProblem


@torch.no_grad()
def top_eigenvector(
    problem: AbstractProblem, z: Float[Tensor, "N D"], *, steps: int, generator: torch.Generator
) -> Float[Tensor, "N D"]:
    r"""Power iteration on the symmetric Jacobian, per row, from a random vector.

    Args:
        steps: products with the Jacobian. :math:`v^\top J v` is never above the largest eigenvalue and close below it
            after some dozens.
        generator: on the CPU, wherever ``z`` is.

    Returns: unit vectors; a row whose Jacobian is 0 keeps the random one.
    """
    check_integer("steps", steps, minimum=0)
    v = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    v = torch.nn.functional.normalize(v, dim=-1)
    for _ in range(steps):
        product = problem.jvp(z, v)
        v = torch.where(product.any(dim=-1, keepdim=True), product, v)
        v = torch.nn.functional.normalize(v, dim=-1)
    return v


def local_lipschitz(
    problem: AbstractProblem, z: Float[Tensor, "N D"], *, steps: int, generator: torch.Generator
) -> Float[Tensor, "N"]:
    r"""The map's Lipschitz constant at ``z``, :math:`v^\top J(z) v \le |J(z)|_2` with ``v`` of ``top_eigenvector``.

    Differentiable in what the problem was built from; ``v`` counts as constant, as it may at an eigenvector
    (Hellmann and Feynman).
    """
    v = top_eigenvector(problem, z, steps=steps, generator=generator)
    return (v * problem.jvp(z, v)).sum(-1)
