"""Anderson mixing, each row on its own."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz.solvers.loop import AbstractRule, Point, Rows

RIDGE = 1e-6
"""Added to the Gram matrix, whose mean diagonal is 1."""

GROWTH = 4.0
"""A row whose squared residual grew by more starts anew."""


class Mixing:
    r"""The last iterates of each row, and their mixture with the smallest residual.

    :math:`z = \sum_i \alpha_i f(z_i)` with :math:`\sum_i \alpha_i = 1` and :math:`|\sum_i \alpha_i r_i|` minimal, from
    :math:`(G / \bar g + 10^{-6} I) \alpha \propto 1`, where :math:`G` is the Gram matrix of the residuals and
    :math:`\bar g` its mean diagonal. Solved in float64.

    Source: Walker & Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._count = 0
        self._maps: Tensor | None = None  # n window D
        self._residuals: Tensor  # n window D
        self._gram: Tensor  # n window window
        self._valid: Tensor  # n window

    def remember(self, point: Point) -> None:
        """Take an iterate in, in place of the oldest."""
        n, width = point.z.shape
        if self._maps is None:
            self._maps = point.z.new_zeros(n, self.window, width)
            self._residuals = torch.zeros_like(self._maps)
            self._gram = point.z.new_zeros(n, self.window, self.window)
            self._valid = torch.zeros(n, self.window, dtype=torch.bool, device=point.z.device)
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
        valid, gram = self._valid, self._gram.double()
        gram = gram.masked_fill(~(valid.unsqueeze(1) & valid.unsqueeze(2)), 0)
        scale = gram.diagonal(dim1=1, dim2=2).sum(1) / valid.sum(1)
        gram = gram / scale.clamp(min=torch.finfo(torch.float64).tiny).view(-1, 1, 1)
        ridge = torch.where(valid, RIDGE, 1.0)
        solved = torch.linalg.solve_ex(gram + ridge.diag_embed(), valid.double().unsqueeze(2))[0].squeeze(2)
        weights = (solved / solved.sum(1, keepdim=True)).to(self._maps.dtype)
        mixed = (weights.unsqueeze(2) * self._maps).sum(1)
        newest = self._maps[:, (self._count - 1) % self.window]
        return torch.where(mixed.isfinite().all(1, keepdim=True), mixed, newest)

    def restart(self, rows: Bool[Tensor, "n"]) -> None:
        """Forget all but the newest iterate of these rows."""
        newest = torch.zeros_like(self._valid[0])
        newest[(self._count - 1) % self.window] = True
        self._valid &= newest | ~rows.unsqueeze(1)

    def take(self, rows: Int[Tensor, "m"]) -> None:
        """Only these rows go on."""
        if self._maps is not None:
            self._maps, self._residuals = self._maps[rows], self._residuals[rows]
            self._gram, self._valid = self._gram[rows], self._valid[rows]


class Anderson(AbstractRule):
    """Mixes at every step, unguarded: fast where the map contracts, no promise elsewhere."""

    def __init__(self, window: int) -> None:
        self._mixing = Mixing(window)

    def propose(self, rows: Rows, point: Point, step: int) -> Float[Tensor, "n D"]:
        self._mixing.remember(point)
        return self._mixing.mix()

    def is_guarded(self, step: int) -> bool:
        return False

    def take(self, rows: Int[Tensor, "m"]) -> None:
        self._mixing.take(rows)
