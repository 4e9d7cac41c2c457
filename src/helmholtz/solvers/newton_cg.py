"""Conjugate gradients on ``I - J``, row by row, and the Newton step made of them."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.solvers.loop import AbstractRule, Point, Rows, choose, row_dot, those_left

FORCING = 1e-2
"""Relative residual at which the linear system of a Newton step counts as solved."""


class LinearSolution(NamedTuple):
    """Where conjugate gradients ended."""

    value: Float[Tensor, "n D"]
    residual: Float[Tensor, "n"]
    """Relative to the right-hand side."""
    num_steps: Int[Tensor, "n"]
    indefinite: Bool[Tensor, "n"]
    """A direction without positive curvature was met; ``value`` is what was reached before."""

    def put(self, rows: Int[Tensor, "n"], into: "LinearSolution | None") -> "LinearSolution":
        """These rows in their places ``into`` all; None: these are all."""
        if into is None:
            return self
        return LinearSolution(*(x.index_copy(0, rows, mine) for x, mine in zip(into, self, strict=True)))


def conjugate_gradients(
    rows: Rows, z: Float[Tensor, "n D"], v: Float[Tensor, "n D"], *, rtol: float, max_steps: int
) -> LinearSolution:
    """Solve ``(I - J(z)) g = v`` for every row until the residual is ``rtol |v|``; the size of ``v`` does not matter.

    Each row runs on its own and leaves when it is done; a row of zeros needs no step. Where no values are, all rows
    make ``max_steps`` steps, of which those after its end change nothing in what is said of a row.
    """
    size = v.abs().amax(1, keepdim=True)
    left = v / torch.where(size > 0, size, 1)
    none = v.new_zeros(len(v), dtype=torch.long)
    now = LinearSolution(torch.zeros_like(v), (size.squeeze(1) > 0).to(v.dtype), none, none > 0)
    index, found, going = torch.arange(len(v), device=v.device), None, rows.going & (now.residual > 0)
    jacobian, direction, square = rows.own.jacobian(z), left, row_dot(left, left)
    full = square
    for step in range(max_steps):
        kept = those_left(going, step)
        if kept is not None:
            if not len(kept):
                break
            found = now.put(index, found)
            jacobian, now = jacobian.take(kept), LinearSolution(*(x[kept] for x in now))
            index, going, left, direction, square, full = (
                x[kept] for x in (index, going, left, direction, square, full)
            )
        image = direction - jacobian.product(direction)
        curvature = row_dot(direction, image)
        positive = curvature > torch.finfo(v.dtype).eps * row_dot(direction, direction)
        length = torch.where(positive, square / curvature, 0).unsqueeze(1)
        g, left = now.value + length * direction, left - length * image
        new = row_dot(left, left)
        now = LinearSolution(
            choose(going, g, now.value),
            torch.where(going, (new / full).sqrt(), now.residual),
            now.num_steps + going,
            now.indefinite | (going & ~positive),
        )
        direction, square = torch.addcmul(left, (new / square).unsqueeze(1), direction), new
        going = going & positive & (now.residual > rtol)
    value, *rest = now.put(index, found)
    rows.counts.products[rows.index] += rest[1]
    return LinearSolution(value * size, *rest)


class Newton(AbstractRule):
    """Truncated Newton steps ``z + d`` with ``(I - J) d = f(z) - z``; the plain step where curvature is negative.

    Where ``I - J`` is positive definite the exact ``d`` lowers the energy and the residual at once.
    """

    def __init__(self, cg_steps: int, *, plain_steps: int = 0) -> None:
        self.cg_steps = cg_steps
        self.plain_steps = plain_steps
        """Steps of the map before the first Newton step."""

    def propose(self, rows: Rows, point: Point, step: int) -> Float[Tensor, "n D"]:
        if step < self.plain_steps:
            return point.f
        residual = point.f - point.z
        solved = conjugate_gradients(rows, point.z, residual, rtol=FORCING, max_steps=self.cg_steps)
        return torch.where(solved.indefinite.unsqueeze(1), point.f, point.z + solved.value)

    def is_guarded(self, step: int) -> bool:
        return step >= self.plain_steps
