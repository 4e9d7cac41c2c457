"""What is random in a model as a function of the row of data it happens to, not of a generator's state.

Within ``drawn_by_row`` dropout masks and plans depend on the key of their row alone. So a training step draws the same
numbers on one process and on many, and again when activations are recomputed. Outside, torch's global generator draws.
"""

import contextlib
from collections.abc import Iterator
from typing import final

import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz.ops.row_random import row_uniform

POSTERIOR, PRIOR = -2, -3
"""Sites of the draws of plans; those of dropout count from 0."""

_keys: Int[Tensor, "B"] | None = None  # of the process and not of the thread: recomputation runs in others


@contextlib.contextmanager
def drawn_by_row(keys: Int[Tensor, "B"]) -> Iterator[None]:
    """While open, forward and backward passes on batches of ``len(keys)`` rows draw from these keys."""
    global _keys
    before, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = before


def drawn_uniform(site: int, like: Shaped[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"] | None:
    """Uniform numbers in float32, one per element of ``like``; None outside of ``drawn_by_row``."""
    if _keys is None:
        return None
    assert len(_keys) == len(like), f"{len(_keys)} keys for {len(like)} rows"
    return row_uniform(_keys.to(like.device), tuple(like.shape[1:]), site=site)


@final
class RowDropout(nn.Module):
    """Dropout whose mask can be a function of the row (``drawn_by_row``); ``number_dropouts`` tells sites apart."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.site = p, 0

    def forward(self, x: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"]:
        if not self.training or self.p == 0:
            return x
        uniform = drawn_uniform(self.site, x)
        if uniform is None:
            return F.dropout(x, self.p)
        return x * (uniform >= self.p).to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def number_dropouts(model: nn.Module) -> None:
    """Give every dropout of a model a site of its own, in the order of its modules."""
    dropouts = [module for module in model.modules() if isinstance(module, RowDropout)]
    for site, module in enumerate(dropouts):
        module.site = site
