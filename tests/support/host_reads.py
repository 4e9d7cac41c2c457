"""Which operations make a processor wait for its GPU: those that read a value, or whose shape depends on values."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim,
         aten._unique2, aten.repeat_interleave}  # fmt: skip
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}


class HostReads(TorchDispatchMode):
    """Names of the operations in ``seen``, as CPU tensors take them. What a kernel does inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func.overloadpacket in READS or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Placements(TorchFunctionMode):
    """Names of the calls that bring values from the processor to a device, where all tensors belong to it.

    For models on the meta device. A value that is made there of a number (``torch.full``) does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            x
            for x in (result if isinstance(result, (list, tuple)) else [result])
            if isinstance(x, torch.Tensor)
        ]
        if any(x.is_cpu for x in made) or func in FROM_VALUES:
            self.seen.append(str(func))
        return result
