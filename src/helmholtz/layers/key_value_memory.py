"""Associations that are written once and looked up for ever: keys that never drift, and a memory of key-value rows."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_integer, check_positive
from helmholtz.layers.recall import RECALL, AssociativeProblem
from helmholtz.layers.slots import SlotPolicy, Slots, check_rows
from helmholtz.solvers import Solution, SolverConfig, solve

SAME_KEY = 1 - 1e-4
"""Cosine from which two keys are one: far above what rounding takes away, far below one of other tokens."""


@final
class NGramKeys(nn.Module):
    """A unit vector for the last ``n`` tokens at every position, frozen from the start.

    The sum of a random vector for each token and its distance, normalised: two n-grams that share one of two tokens
    in the same place have a cosine near 1/2. Causal. Nothing is learned, so that a key written today is found
    tomorrow; features that training moves are not.

    Args:
        n: tokens in a key, the current one included.
        seed: decides the vectors, which are also saved in the state dict.
    """

    table: Float[Tensor, "n V D"]

    def __init__(self, vocab_size: int, d_key: int, *, n: int = 2, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("d_key", d_key), ("n", n)):
            check_integer(name, value)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("table", torch.randn(n, vocab_size, d_key, generator=generator))

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Shaped[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Keys of every position; what lies before the start adds nothing, and neither do pads (their keys are 0).

        Raises: ValueError for a real token outside the vocabulary.
        """
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        inside = (tokens >= 0) & (tokens < self.table.shape[1]) | ~real
        check(bool(inside.all()), "tokens", "an id outside", f"in [0, {self.table.shape[1]})")
        tokens = tokens.masked_fill(~real, 0)
        total = torch.zeros(*tokens.shape, self.table.shape[2], device=tokens.device)
        for distance, vectors in enumerate(self.table.unbind(0)):
            if distance < tokens.shape[1]:
                until = tokens.shape[1] - distance
                total[:, distance:] += vectors[tokens[:, :until]] * real[:, :until].unsqueeze(-1)
        return F.normalize(total * real.unsqueeze(-1), dim=-1)


@dataclass(frozen=True, slots=True)
class KeyValueReading:
    """What a memory answers to each query."""

    value: Int[Tensor, "N"]
    """The value closest to what was retrieved; says nothing where ``answered`` is false."""
    confidence: Float[Tensor, "N"]
    """Cosine of the retrieved key with the query's, 0 from an empty memory."""
    answered: Bool[Tensor, "N"]
    """Where the confidence reaches the memory's threshold."""
    solution: Solution


@final
class KeyValueMemory(nn.Module):
    r"""Associations as rows :math:`R\,[k \mid v] / \sqrt 2` of a Hopfield memory, read from :math:`[k \mid 0]`.

    ``k`` is a unit key and ``v`` the frozen random unit vector of a value id. Reading iterates the retrieval steps of
    :math:`E(z) = \tfrac12 |z|^2 - \phi(z)` from the key alone; the equilibrium completes the value. A key that is not
    stored is drawn to another one, which its ``confidence`` tells. Learns nothing by gradients.

    Args:
        n_slots: associations it can hold.
        beta: inverse temperature. A query scores :math:`\beta R^2 / 2` at its own row, with
            :math:`R^2 = \sqrt{d_{key} + d_{value}}`, and half of that at one whose key has cosine 1/2.
        policy: which association a full memory gives up, see ``Slots``.
        threshold: confidence from which an answer counts.
        seed: decides the values' vectors, which are also saved in the state dict.
    """

    values: Float[Tensor, "V W"]

    def __init__(
        self,
        d_key: int,
        n_values: int,
        n_slots: int,
        *,
        d_value: int | None = None,
        beta: float = 8.0,
        policy: SlotPolicy = "fifo",
        threshold: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        d_value = d_key if d_value is None else d_value
        sizes = {"d_key": d_key, "d_value": d_value, "n_values": n_values, "n_slots": n_slots}
        for name, value in sizes.items():
            check_integer(name, value)
        check_positive("beta", beta)
        check(0 < threshold <= 1, "threshold", threshold, "in (0, 1]")
        self.d_key, self.beta, self.threshold = d_key, beta, threshold
        self.radius = (d_key + d_value) ** 0.25
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(n_values, d_value, generator=generator)
        self.register_buffer("values", F.normalize(vectors, dim=-1))
        self.store = Slots(d_key + d_value, n_slots, policy)

    @property
    def num_stored(self) -> int:
        """Associations it holds."""
        return int(self.store.occupied.sum())

    @property
    def num_bytes(self) -> int:
        """Memory of the rows that are in use."""
        return self.num_stored * self.store.rows[0].nbytes

    @torch.no_grad()
    def write(
        self,
        keys: Float[Tensor, "..."],
        values: Int[Tensor, "..."],
        mask: Shaped[Tensor, "..."] | None = None,
        *,
        in_eval: bool = False,
    ) -> int:
        """Associate keys with value ids, in their order. A key that is stored already gets the new value in its slot.

        Args:
            keys: of any norm, detached.
            mask: non-zero where a pair is real.
            in_eval: allow it in evaluation mode, in which a memory does not change by accident.

        Returns: associations that are new or were changed and kept.
        Raises: ValueError in evaluation mode without ``in_eval``, for keys of another width, a real key that is not
            finite or has no direction, and a value outside the table; nothing is written then.
        """
        check(self.training or in_eval, "in_eval", in_eval, "true to write in evaluation mode")
        check(values.shape == keys.shape[:1], "values", tuple(values.shape), f"of shape ({len(keys)},)")
        if mask is not None:
            check(mask.shape == keys.shape[:1], "mask", tuple(mask.shape), f"of shape ({len(keys)},)")
            keys, values = keys[mask != 0], values[mask != 0]
        keys = keys.to(self.store.rows.dtype)
        check_rows("keys", keys, self.d_key)
        inside = (values >= 0) & (values < len(self.values))
        check(bool(inside.all()), "values", "an id outside", f"in [0, {len(self.values)})")
        rows = torch.cat([F.normalize(keys, dim=-1), self.values[values]], dim=-1) * (self.radius / 2**0.5)
        return self.store.write(rows, SAME_KEY * self.radius**2, self._place)

    def _place(self, row: Float[Tensor, "D"], products: Float[Tensor, "S"]) -> int | None:
        """Puts an association into the slot of its key, or into a new one."""
        half = self.radius**2 / 2
        same_key = self.store.rows[:, : self.d_key] @ row[: self.d_key] >= SAME_KEY * half
        slot = int(same_key.int().argmax()) if same_key.any() else self.store.next_slot()
        if slot is not None:
            self.store.put(slot, row)
        return slot

    @torch.no_grad()
    def read(self, keys: Float[Tensor, "..."], solver: SolverConfig = RECALL) -> KeyValueReading:
        """The value of each key, and how sure it is; without gradient, as a value is an id.

        Raises: ValueError for keys that ``write`` would refuse.
        """
        keys = keys.to(self.store.rows.dtype)
        check_rows("keys", keys, self.d_key)
        keys = F.normalize(keys, dim=-1)
        nothing = keys.new_zeros(len(keys), self.values.shape[1])
        start = torch.cat([keys, nothing], dim=-1) * (self.radius / 2**0.5)
        empty = torch.zeros_like(self.store.rows[:, 0]).masked_fill(~self.store.occupied, -torch.inf)
        solution = solve(AssociativeProblem(self.store.rows, self.beta, empty), start, solver)
        key, value = solution.value.split([self.d_key, self.values.shape[1]], dim=-1)
        confidence = F.cosine_similarity(key, keys.to(key.dtype), dim=-1)
        best = (value @ self.values.to(value.dtype).T).argmax(-1)
        return KeyValueReading(best, confidence, confidence >= self.threshold, solution)
