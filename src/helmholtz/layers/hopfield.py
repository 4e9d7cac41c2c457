"""A Hopfield memory: patterns that are learned and patterns that are written, and plain recall from both."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_integer, check_positive
from helmholtz._once import is_traced
from helmholtz.layers.slots import Slots, check_rows
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops.hopfield import (
    hopfield_retrieve,
    hopfield_weights,
    pattern_scores,
    potential_of_scores,
    retrieval_margin,
    weights_of_scores,
)
from helmholtz.solvers import (
    AbstractAdjoint,
    AbstractProblem,
    Implicit,
    Solution,
    SolverConfig,
    Unrolled,
    solve,
)

MemoryPolicy = Literal["fifo", "reservoir", "merge"]

SAFE_MARGIN = 3.0
"""Nats by which a pattern should outweigh the others at its own place (``ops.retrieval_margin``)."""

RECALL = SolverConfig(mode="picard", max_steps=100, rtol=1e-4, energy_rtol=1e-4, on_nonconvergence="ignore")
"""The update as it is, which alone decides in which pattern's basin a query lies."""


class MarginWarning(UserWarning):
    """The memory holds more patterns than its width and temperature tell apart."""


@final
@dataclass(frozen=True, slots=True)
class AssociativeProblem(AbstractProblem):
    r"""Plain recall: :math:`E(z) = \tfrac12 |z|^2 - \phi(z)` and its map, one retrieval step. Rows share it all."""

    patterns: Float[Tensor, "K D"]
    beta: float
    log_prior: Float[Tensor, "K"] | None = None

    def map(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return hopfield_retrieve(z, self.patterns, self.beta, self.log_prior)

    def map_and_energy(self, z: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
        scores = pattern_scores(z, self.patterns, self.beta, self.log_prior)
        weights = weights_of_scores(scores, self.log_prior)
        with full_precision(z.device):
            f = (weights @ self.patterns.to(weights.dtype)).to(z.dtype)
        potential = potential_of_scores(scores, self.beta, self.log_prior)
        return f, z.to(scores.dtype).square().sum(-1) / 2 - potential

    def jvp(self, z: Float[Tensor, "N D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        weights = hopfield_weights(z, self.patterns, self.beta, self.log_prior)
        with full_precision(z.device):
            projected = v @ self.patterns.to(v.dtype).T
            centred = projected - (weights * projected).sum(-1, keepdim=True)
            return self.beta * (weights * centred) @ self.patterns.to(v.dtype)

    def take(self, rows: Int[Tensor, "n"]) -> "AssociativeProblem":
        return self


@final
class HopfieldMemory(nn.Module):
    r"""Patterns of norm ``radius`` in two blocks: learned ones, and slots that are written between forward passes.

    With :math:`R = D^{1/4}` the exponent :math:`\beta R^2 = \beta \sqrt{D}` grows with the width as the noise of
    random scores does; patterns of norm 1 would all retrieve their mean.

    A row is *novel* if its cosine to every occupied slot is below ``novelty``. What happens to one that is not, and
    which slot a novel row takes from a full memory:

    * "fifo": it is dropped; the oldest row goes.
    * "reservoir": it is dropped; every novel row so far is kept with the same probability.
    * "merge": it moves the closest slot, to the mean direction of all rows merged there; the oldest slot goes.

    Attributes:
        memory_patterns: the learned block, of any norm: only directions count. The only parameter of any model whose
            name contains "memory".
        store: the slots, saved with the state dict.

    Args:
        n_patterns: learned patterns; 0 for a memory that is only written.
        beta: inverse temperature in nats per unit of a squared pattern.
    """

    def __init__(
        self,
        d_model: int,
        n_patterns: int,
        *,
        n_slots: int = 0,
        beta: float = 2.0,
        policy: MemoryPolicy = "fifo",
        novelty: float = 0.9,
    ) -> None:
        super().__init__()
        check_integer("d_model", d_model)
        check_integer("n_patterns", n_patterns, minimum=0)
        check_positive("beta", beta)
        check_choice("policy", policy, get_args(MemoryPolicy))
        check(0 < novelty <= 1, "novelty", novelty, "in (0, 1]")
        self.d_model, self.beta, self.policy, self.novelty = d_model, beta, policy, novelty
        self.radius = d_model**0.25
        self.memory_patterns = nn.Parameter(torch.randn(n_patterns, d_model))
        self.store = Slots(d_model, n_slots, "reservoir" if policy == "reservoir" else "fifo")

    @property
    def n_slots(self) -> int:
        return len(self.store.rows)

    @property
    def slots(self) -> Float[Tensor, "S D"]:
        """The written rows; zeros where nothing is stored."""
        return self.store.rows

    @property
    def occupied(self) -> Bool[Tensor, "S"]:
        """Slots that hold a pattern."""
        return self.store.occupied

    def patterns(self) -> Float[Tensor, "K D"]:
        """All rows at norm ``radius``, the learned ones first, in at least float32; empty slots as zeros."""
        wide = compute_dtype(self.memory_patterns)
        learned = self.radius * F.normalize(self.memory_patterns.to(wide), dim=-1)
        return learned if not self.n_slots else torch.cat([learned, self.store.rows.to(wide)])

    def log_prior(self) -> Float[Tensor, "K"] | None:
        """0 for every row that holds a pattern and minus infinity for an empty slot; None without slots."""
        if not self.n_slots:
            return None
        learned = self.store.rows.new_zeros(len(self.memory_patterns))
        empty = torch.zeros_like(self.store.rows[:, 0]).masked_fill(~self.store.occupied, -torch.inf)
        return torch.cat([learned, empty]).to(compute_dtype(self.memory_patterns))

    @torch.no_grad()
    def write(
        self, rows: Float[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None, *, in_eval: bool = False
    ) -> int:
        """Store rows in their order, detached and at norm ``radius``; each is compared with those before it too.

        Args:
            mask: non-zero where a row is real; the others are neither looked at nor stored.
            in_eval: allow it in evaluation mode, in which a memory does not change by accident.

        Returns: rows that changed the memory.
        Raises: ValueError if there are no slots, in evaluation mode without ``in_eval``, for rows of another width
            and for a real row that is not finite or has no direction; nothing is written then.
        """
        check(self.n_slots > 0, "n_slots", self.n_slots, "positive for a memory that is written")
        check(self.training or in_eval, "in_eval", in_eval, "true to write in evaluation mode")
        if mask is not None:
            check(mask.shape == rows.shape[:1], "mask", tuple(mask.shape), f"of shape ({len(rows)},)")
            rows = rows[mask != 0]
        rows = rows.to(self.store.rows.dtype)
        check_rows("rows", rows, self.d_model)
        # a merged row moves its slot, so that none can be left out
        known = torch.inf if self.policy == "merge" else self.novelty * self.radius**2
        return self.store.write(self.radius * F.normalize(rows, dim=-1), known, self._place)

    def _place(self, row: Float[Tensor, "D"], products: Float[Tensor, "S"]) -> int | None:
        """Puts a novel row into a slot of its own, merges another into the closest."""
        store, closest = self.store, int(products.argmax())
        if products[closest] < self.novelty * self.radius**2:
            slot = store.next_slot()
            if slot is not None:
                store.put(slot, row)
            return slot
        count = int(store.counts[closest])
        mean = F.normalize(count * store.rows[closest] + row, dim=0)
        store.put(closest, self.radius * mean, count=count + 1)
        return closest

    def retrieve(self, query: Float[Tensor, "N D"], solver: SolverConfig = RECALL) -> Solution:
        r"""Plain associative recall, without projections: where the retrieval steps from each query end.

        ``value`` holds the recalled rows, at norm close to ``radius`` where a single pattern was found; ``energy`` is
        :math:`\tfrac12 |z|^2 - \phi(z)`. A query should be of the patterns' scale. An empty memory recalls 0.

        Both are differentiable, in the query and in the learned patterns, by the steps each row took. Recall is close
        to constant inside a pattern's basin: the gradient of the query is small there. It costs as much again, and one
        evaluation's memory per step; under ``torch.no_grad`` nothing. Another ``solver`` than plain steps ("picard")
        has the implicit gradient, which is 0 for the query.

        Raises: ValueError for a query that is not finite. Warns: MarginWarning if the memory holds more patterns than
            can be told apart, were their directions random.
        """
        check(bool(query.isfinite().all()), "query", "NaN or infinity", "finite")
        self._warn_of_a_small_margin()
        problem = AssociativeProblem(self.patterns(), self.beta, self.log_prior())
        solution = solve(problem, query.to(problem.patterns.dtype), solver)
        return _with_gradient(problem, solution, solver)

    def margin(self) -> float:
        """``ops.retrieval_margin`` of what the memory holds; infinite when it holds nothing."""
        held = len(self.memory_patterns) + int(self.store.occupied.sum())
        return retrieval_margin(self.d_model, held, self.beta, self.radius) if held else float("inf")

    def _warn_of_a_small_margin(self) -> None:
        margin = self.margin()
        if margin < SAFE_MARGIN:
            warnings.warn(
                f"the retrieval margin is {margin:.2f} nats: below {SAFE_MARGIN:g} patterns blend into each other; "
                "take a larger beta, a larger d_model or fewer patterns",
                MarginWarning,
                stacklevel=3,
            )


def _with_gradient(problem: AssociativeProblem, solution: Solution, solver: SolverConfig) -> Solution:
    """The same value and energy, with a graph if one is wanted."""
    tracked = problem.patterns.requires_grad or solution.start.requires_grad or is_traced()
    if not (tracked and torch.is_grad_enabled()):
        return solution
    plain = solver.mode == "picard" and solver.damping == 1
    adjoint: AbstractAdjoint = Unrolled() if plain else Implicit(on_nonconvergence="ignore")
    z = adjoint.attach(problem, solution)
    value = solution.value + (z - z.detach())
    return replace(solution, value=value, energy=problem.map_and_energy(value)[1])
