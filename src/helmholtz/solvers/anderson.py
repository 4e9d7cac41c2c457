"""Anderson mixing, each row on its own."""

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.solvers.loop import AbstractRule, Point, Rows
from helmholtz.solvers.picard import descent_step

RIDGE = 1e-6
"""Added to the newest iterate's diagonal entry of the residuals' cosines."""

AGEING = 10.0
"""The ridge grows by this factor with every older iterate: where residuals are parallel and many mixtures would do,
as near a single slow direction, the newest iterates are taken. Without it such a row needs 14 steps instead of 11."""

GROWTH = 4.0
"""A row whose squared residual grew by more starts anew."""


@final
class Anderson(AbstractRule):
    r"""Moves to the mixture of the last iterates of each row that has the smallest residual.

    :math:`z = \sum_i \alpha_i f(z_i)` with :math:`\sum_i \alpha_i = 1` and :math:`|\sum_i \alpha_i r_i|^2 + \sum_i
    \rho_i \alpha_i^2 |r_i|^2` minimal: :math:`(C + \mathrm{diag}\, \rho)\, (|r| \odot \alpha) \propto 1 / |r|` for the
    matrix ``C`` of the residuals' cosines. The ridge is relative to each residual, so that large old ones do not blur
    small new ones. Solved in float64.

    Args:
        damping: None mixes at every step, unguarded: fast where the map contracts, no promise elsewhere. Otherwise
            even steps mix, and a mixture that does not lower the energy is refused; odd ones descend by so much.

    Source: Walker & Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011.
    """

    def __init__(self, window: int, damping: float | None = None) -> None:
        self.window, self.damping = window, damping
        self._count = 0
        self._maps: Tensor | None = None  # n window D
        self._residuals: Tensor  # n window D
        self._gram: Tensor  # n window window
        self._valid: Tensor  # n window

    def propose(self, rows: Rows, point: Point, step: int) -> Float[Tensor, "n D"]:
        self.remember(point)
        if self.damping is None or self.is_guarded(step):
            return self.mix() if self._count > 1 else point.f
        return descent_step(point, self.damping)

    def is_guarded(self, step: int) -> bool:
        return self.damping is not None and step % 2 == 0

    def remember(self, point: Point) -> None:
        """Take an iterate in, in place of the oldest."""
        n, width = point.z.shape
        if self._maps is None:
            self._maps = point.z.new_zeros(n, self.window, width)
            self._residuals = torch.zeros_like(self._maps)
            self._gram = point.z.new_zeros(n, self.window, self.window)
            self._valid = point.z.new_zeros(n, self.window, dtype=torch.bool)
        last, slot = (self._count - 1) % self.window, self._count % self.window
        self._count += 1
        residual = point.f - point.z
        grew = self._valid[:, last] & (residual.square().sum(-1) > GROWTH * self._gram[:, last, last])
        self._maps[:, slot], self._residuals[:, slot] = point.f, residual
        products = (self._residuals * residual.unsqueeze(1)).sum(-1)
        self._gram[:, slot], self._gram[:, :, slot] = products, products
        self._valid[:, slot] = True
        self.restart(grew)

    def mix(self) -> Float[Tensor, "n D"]:
        """The mixture; the map of the newest iterate where it is not finite."""
        assert self._maps is not None
        valid, newest = self._valid, (self._count - 1) % self.window
        size = self._gram.diagonal(dim1=1, dim2=2).double().sqrt()
        size = torch.where(valid & (size > 0), size, 1)
        cosines = self._gram / (size.unsqueeze(1) * size.unsqueeze(2))
        cosines = cosines.masked_fill(~(valid.unsqueeze(1) & valid.unsqueeze(2)), 0)
        age = (newest - torch.arange(self.window, device=size.device)) % self.window
        ridge = torch.where(valid, RIDGE * AGEING ** age.double(), 1.0)
        solved = torch.linalg.solve_ex(cosines + ridge.diag_embed(), (valid / size).unsqueeze(2))[0]
        weights = solved.squeeze(2) / size
        weights = (weights / weights.sum(1, keepdim=True)).to(self._maps.dtype)
        mixed = (weights.unsqueeze(2) * self._maps).sum(1)
        return torch.where(mixed.isfinite().all(1, keepdim=True), mixed, self._maps[:, newest])

    def restart(self, rows: Bool[Tensor, "n"]) -> None:
        """Forget all but the newest iterate of these rows."""
        if self._count == 1:
            return
        newest = torch.zeros_like(self._valid[0])
        newest[(self._count - 1) % self.window] = True
        self._valid &= newest | ~rows.unsqueeze(1)

    def take(self, rows: Int[Tensor, "m"]) -> None:
        """Only these rows go on."""
        if self._maps is not None:
            self._maps, self._residuals = self._maps[rows], self._residuals[rows]
            self._gram, self._valid = self._gram[rows], self._valid[rows]
