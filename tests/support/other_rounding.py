"""Another processor's rounding: products, sums and functions end a rounding away, by their place in the result.

A matrix product may sum a row in another order where it stands elsewhere in the tile, and the vectors' exponential may
differ from that of the left-over elements: both are the libraries' to choose, and they choose differently on AMD and on
Intel. Under this mode every such result is moved by a rounding that depends on its place and on the shape alone: what
is still equal holds by construction, what is not holds on this processor by luck.

``OTHER_ROUNDING=1 pytest tests/...`` runs any test like this.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
"""Where the first factor stands among the arguments."""
SUMS = {aten.sum, aten.mean}
OTHERS = {
    aten.convolution, aten._scaled_dot_product_flash_attention_for_cpu, aten._softmax, aten._log_softmax, aten.exp,
    aten.tanh, aten.sigmoid, aten.log, aten.log1p, aten.expm1, aten.silu, aten.gelu, aten.logsumexp, aten.softplus,
    aten.cumsum, aten.rsqrt,
}  # fmt: skip


class OtherRounding(TorchDispatchMode):
    """Each inexact result of a product, a sum or a function is the next number above or below, or what it was.

    Args:
        roundings: of the summands of a product by which it moves further, as sums that cancel do.
    """

    def __init__(self, roundings: float = 0.0) -> None:
        super().__init__()
        self._roundings = roundings

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        size = fixed = None
        if packet in PRODUCTS:
            a, b = (x.detach() for x in args[PRODUCTS[packet] :][:2])
            if a.is_floating_point():
                size = a.abs() @ b.abs() if self._roundings else None
                fixed = (a != 0).to(a.dtype) @ (b != 0).to(a.dtype) <= 1
        elif packet in SUMS and args[0].is_floating_point():
            # a single summand has no order
            given = {name: value for name, value in kwargs.items() if name not in ("out", "dtype")}
            fixed = packet((args[0].detach() != 0).double(), *args[1:], **given)
            fixed = fixed * (1 if packet is aten.sum else args[0].numel() / max(fixed.numel(), 1)) <= 1
        elif packet not in OTHERS:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        whole = out[0] if isinstance(out, tuple) else out
        if not whole.is_meta and whole.dtype in (torch.float32, torch.float64) and whole.numel():
            self._move(whole, size, fixed)
        return out

    def _move(self, out: Tensor, size: Tensor | None, fixed: Tensor | None) -> None:
        sign = _signs(tuple(out.shape)).to(out.dtype)
        moved = torch.where(sign == 0, out, torch.nextafter(out, sign * torch.inf))
        if size is not None:
            moved = moved + self._roundings * sign * torch.finfo(out.dtype).eps * size / 2
        still = _is_short(out) if fixed is None else _is_short(out) | fixed
        out.copy_(torch.where(still, out, moved))


def _is_short(x: Tensor) -> Tensor:
    """Few digits: a sum that is exact in whatever order, as of zeros and ones."""
    scaled = torch.frexp(x)[0] * 2.0 ** (12 if x.dtype == torch.float32 else 24)
    return (scaled == scaled.round()) | ~x.isfinite()


@lru_cache(maxsize=256)
def _signs(shape: tuple[int, ...]) -> Tensor:
    """-1, 0 or 1 for each place."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    return torch.randint(-1, 2, shape, generator=generator)
