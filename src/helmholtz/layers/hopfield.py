"""A Hopfield memory: patterns that are learned and patterns that are written, and plain recall from both."""

import functools
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, final, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_integer, check_positive
from helmholtz.layers.recall import RECALL, AssociativeProblem, with_gradient
from helmholtz.layers.slots import Slots, check_rows
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.hopfield import pattern_margins, pattern_scores
from helmholtz.solvers import Solution, SolverConfig, solve

MemoryPolicy = Literal["fifo", "reservoir", "merge"]

SAFE_MARGIN = 3.0
"""Nats by which a pattern should outweigh the others at its own place (``ops.pattern_margins``)."""
SMALL_QUERY = 0.25
"""Norm of a query over the patterns' below which ``retrieve`` warns."""


class MarginWarning(UserWarning):
    """The memory's width and temperature do not tell patterns apart, or a query is too small to tell them apart."""


class NoveltyWarning(UserWarning):
    """Rows that were to be written are too close to stored ones."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What became of the rows of one ``write``; ``stored + merged + dropped`` are all that were real."""

    stored: int
    """Rows that took a slot."""
    merged: int
    """Rows that moved the closest slot (policy "merge")."""
    dropped: int
    """Rows that left no trace: not novel ("fifo", "reservoir"), or not chosen by the reservoir."""
    replaced: int
    """Slots whose pattern was given up for one of the stored rows."""

    @property
    def changed(self) -> int:
        """Rows that changed the memory."""
        return self.stored + self.merged


class StoredPatterns(NamedTuple):
    """What a memory holds when it is called."""

    patterns: Float[Tensor, "K D"]
    log_prior: Float[Tensor, "K"] | None
    beta: float
    radius: float


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

    Rows that share a large mean, such as raw images or counts, are all close to each other: subtract it first.

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
        self._has_warned = False
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

    def forward(self) -> StoredPatterns:
        """What it holds; every reader calls the module, as its weights and slots may be offloaded."""
        wide = compute_dtype(self.memory_patterns)
        learned = self.radius * F.normalize(self.memory_patterns.to(wide), dim=-1)
        if not self.n_slots:
            return StoredPatterns(learned, None, self.beta, self.radius)
        rows, occupied = self.store()
        empty = torch.cat([occupied.new_zeros(len(learned)), ~occupied])
        log_prior = rows.new_zeros(len(empty), dtype=wide).masked_fill(empty, -torch.inf)
        return StoredPatterns(torch.cat([learned, rows.to(wide)]), log_prior, self.beta, self.radius)

    def patterns(self) -> Float[Tensor, "K D"]:
        """All rows at norm ``radius``, the learned ones first, in at least float32; empty slots as zeros."""
        stored: StoredPatterns = self()
        return stored.patterns

    def log_prior(self) -> Float[Tensor, "K"] | None:
        """0 for every row that holds a pattern and minus infinity for an empty slot; None without slots."""
        stored: StoredPatterns = self()
        return stored.log_prior

    @torch.no_grad()
    def write(
        self,
        rows: Float[Tensor, "..."],
        mask: Shaped[Tensor, "..."] | None = None,
        *,
        in_eval: bool = False,
        warn: bool = True,
    ) -> WriteResult:
        """Store rows in their order, detached and at norm ``radius``; each is compared with those before it too.

        Args:
            mask: non-zero where a row is real; the others are neither looked at nor stored.
            in_eval: allow it in evaluation mode, in which a memory does not change by accident.
            warn: False where rows that are not novel are expected, as the states of a model are.

        Warns: NoveltyWarning, once per memory, if rows that are not novel are dropped.
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
        tally = Counter[str]()
        place = functools.partial(self._place, tally)
        self.store.write(self.radius * F.normalize(rows, dim=-1), known, place)
        dropped = len(rows) - tally["stored"] - tally["merged"]
        if warn:
            self._warn_of_known_rows(dropped - tally["passed over"], len(rows))
        return WriteResult(tally["stored"], tally["merged"], dropped, tally["replaced"])

    def _place(
        self, tally: Counter[str], row: Float[Tensor, "D"], products: Float[Tensor, "S"]
    ) -> int | None:
        """Puts a novel row into a slot of its own, merges another into the closest."""
        store, closest = self.store, int(products.argmax())
        if products[closest] < self.novelty * self.radius**2:
            slot = store.next_slot()
            if slot is None:
                tally["passed over"] += 1
                return None
            tally.update({"stored": 1, "replaced": int(store.counts[slot] > 0)})
            store.put(slot, row)
            return slot
        tally["merged"] += 1
        count = int(store.counts[closest])
        mean = F.normalize(count * store.rows[closest] + row, dim=0)
        store.put(closest, self.radius * mean, count=count + 1)
        return closest

    def _warn_of_known_rows(self, n_known: int, n_rows: int) -> None:
        if n_known and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{n_known} of {n_rows} rows were not stored: their cosine to a stored row is novelty = "
                f"{self.novelty:g} or more. Rows that share a large mean (raw images, counts) are all alike: subtract "
                "it first; or take a larger novelty, or policy='merge'",
                NoveltyWarning,
                stacklevel=3,
            )

    def retrieve(self, query: Float[Tensor, "N D"], solver: SolverConfig = RECALL) -> Solution:
        r"""Plain associative recall, without projections: where the retrieval steps from each query end.

        ``value`` holds the recalled rows, at norm close to ``radius`` where a single pattern was found; ``energy`` is
        :math:`\tfrac12 |z|^2 - \phi(z)`. A query should be of the patterns' scale. An empty memory recalls 0.

        Both are differentiable, in the query and in the learned patterns, by the steps each row took. Recall is close
        to constant inside a pattern's basin: the gradient of the query is small there. It costs as much again, and one
        evaluation's memory per step; under ``torch.no_grad`` nothing. Another ``solver`` than plain steps ("picard")
        has the implicit gradient, which is 0 for the query.

        Raises: ValueError for a query that is not finite.
        Warns: MarginWarning if a pattern that was recalled has a margin below ``SAFE_MARGIN``, or if the norm of a
            query is below ``SMALL_QUERY`` of theirs. A larger one acts like a larger ``beta`` in the first step.
        """
        check(bool(query.isfinite().all()), "query", "NaN or infinity", "finite")
        stored: StoredPatterns = self()
        problem = AssociativeProblem(stored.patterns, self.beta, stored.log_prior)
        solution = solve(problem, query.to(problem.patterns.dtype), solver)
        self._warn_of_the_scale(query.detach())
        self._warn_of_a_small_margin(problem, solution.value.detach())
        return with_gradient(problem, solution, solver)

    @torch.no_grad()
    def margin(self) -> float:
        """The smallest of ``ops.pattern_margins``, in nats: of the pattern that is told apart worst.

        Infinite when there are no two. Cost: the square of the number of patterns.
        """
        stored: StoredPatterns = self()
        margins = pattern_margins(stored.patterns, self.beta, stored.log_prior)
        return margins.amin().item() if len(margins) else math.inf

    @torch.no_grad()
    def _warn_of_a_small_margin(self, problem: AssociativeProblem, recalled: Float[Tensor, "N D"]) -> None:
        if not len(problem.patterns):
            return
        scores = pattern_scores(recalled, problem.patterns, problem.beta, problem.log_prior)
        closest = scores.argmax(-1).unique()
        margins = pattern_margins(problem.patterns, problem.beta, problem.log_prior, chosen=closest)
        small = margins[margins < SAFE_MARGIN]
        if len(small):
            warnings.warn(
                f"the retrieval margin is {small.amin():.2f} nats, and below {SAFE_MARGIN:g} of {len(small)} of the "
                f"{len(closest)} patterns recalled: they blend into others; take a larger beta, fewer patterns or a "
                "larger d_model, and subtract the mean of rows that share one (raw images, counts) before writing",
                MarginWarning,
                stacklevel=3,
            )

    def _warn_of_the_scale(self, query: Float[Tensor, "N D"]) -> None:
        ratio = query.norm(dim=-1) / self.radius
        small = ratio[(ratio < SMALL_QUERY) & (ratio > 0)]
        if len(small):
            warnings.warn(
                f"{len(small)} of {len(ratio)} queries are of a smaller scale than the patterns (down to "
                f"{small.amin():.2g} of their norm, {self.radius:.2f}), and are drawn to the mean of many; scale them: "
                "memory.radius * torch.nn.functional.normalize(query, dim=-1)",
                MarginWarning,
                stacklevel=3,
            )
