"""Rows that are written instead of learned, and which of them makes room for the next."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_integer

SlotPolicy = Literal["fifo", "reservoir"]

Place = Callable[[Float[Tensor, "D"], Float[Tensor, "S"]], int | None]
"""Puts a row, given its products with the slots (minus infinity with empty ones); returns the slot that it changed, or
None."""

BLOCK = 64
"""Rows that are compared with all slots at once."""


class Stored(NamedTuple):
    """What slots hold when they are called."""

    rows: Float[Tensor, "S D"]
    """Zeros where nothing is stored."""
    occupied: Bool[Tensor, "S"]


class Slots(nn.Module):
    """``n_slots`` rows of one width in buffers that the state dict keeps.

    "fifo" gives up the oldest row; "reservoir" keeps a uniform sample of all rows that came (Vitter 1985, algorithm
    R), drawn by a hash of their number, so that a restored memory goes on as the saved one would have.
    """

    rows: Float[Tensor, "S D"]
    counts: Int[Tensor, "S"]
    """Rows that went into each; 0 is an empty slot."""
    cursor: Int[Tensor, "1"]
    """The slot that "fifo" fills next."""
    num_written: Int[Tensor, "1"]
    """Rows that asked for a slot so far."""

    def __init__(self, width: int, n_slots: int, policy: SlotPolicy) -> None:
        super().__init__()
        check_integer("n_slots", n_slots, minimum=0)
        check_choice("policy", policy, get_args(SlotPolicy))
        self.policy = policy
        self.register_buffer("rows", torch.zeros(n_slots, width))
        self.register_buffer("counts", torch.zeros(n_slots, dtype=torch.long))
        self.register_buffer("cursor", torch.zeros(1, dtype=torch.long))
        self.register_buffer("num_written", torch.zeros(1, dtype=torch.long))

    def forward(self) -> Stored:
        """What a memory reads, by a call of the module: its buffers may be offloaded."""
        return Stored(self.rows, self.occupied)

    @property
    def occupied(self) -> Bool[Tensor, "S"]:
        return self.counts > 0

    def next_slot(self) -> int | None:
        """The slot for one more row; None if this one is not kept."""
        number, n_slots = int(self.num_written), len(self.rows)
        self.num_written += 1
        if self.policy == "reservoir":
            slot = number if number < n_slots else hash_below(number, number + 1)
            return slot if slot < n_slots else None
        slot = int(self.cursor)
        self.cursor.fill_((slot + 1) % n_slots)
        return slot

    def write(self, rows: Float[Tensor, "N D"], known: float, place: Place) -> int:
        """Place rows in their order, those left out that are known when their turn comes.

        Args:
            known: product with a stored row from which a row is known; infinity leaves none out.
            place: puts a row into a slot.

        Returns: rows that changed a slot.
        Cost: a Python step per placed row, and one per ``BLOCK`` rows for those left out.
        """
        return sum(self._write_block(block, known, place) for block in rows.split(BLOCK))

    def _write_block(self, rows: Float[Tensor, "n D"], known: float, place: Place) -> int:
        products = (rows @ self.rows.T).masked_fill(~self.occupied, -torch.inf)
        num_changed = turn = 0
        while turn < len(rows):
            if products[turn].amax() >= known:
                new = products[turn:].amax(-1) < known
                if not new.any():
                    break
                turn += int(new.int().argmax())
            slot = place(rows[turn], products[turn])
            if slot is not None:
                products[:, slot] = rows @ self.rows[slot]
                num_changed += 1
            turn += 1
        return num_changed

    def put(self, slot: int, row: Float[Tensor, "D"], *, count: int = 1) -> None:
        """Overwrite a slot with the mean of ``count`` rows."""
        self.rows[slot] = row.detach()
        self.counts[slot] = count

    def clear(self) -> None:
        """Forget everything."""
        for buffer in (self.rows, self.counts, self.cursor, self.num_written):
            buffer.zero_()


def hash_below(number: int, bound: int) -> int:
    """A number in ``[0, bound)`` that looks random: the splitmix64 hash of ``number``, scaled.

    Source: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    mask = (1 << 64) - 1
    x = (number + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) * bound >> 64


def check_rows(name: str, rows: Tensor, width: int) -> None:
    """A matrix of that width whose every row is finite and has a direction."""
    check(rows.ndim == 2 and rows.shape[1] == width, name, tuple(rows.shape), f"of shape (n, {width})")
    check(bool(rows.isfinite().all()), name, "NaN or infinity", "finite in every row that is real")
    check(bool((rows != 0).any(-1).all()), name, "a row of zeros", "of a direction in every row that is real")
