"""Operations and memory of each mixer, forward and backward, with kernels and in plain forms.

Operations are all that torch dispatches below autograd. Those that compute, which on a GPU are launches, are counted
apart: views and allocations are left out. Floor: their number depends on neither batch nor width, and on the length
only by the chunks; the memory is that of what a backward pass must keep.

    python benchmarks/layers/operations.py
"""

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from _timing import parse_options, peak_bytes, print_table, write_results
from speed import D_MODEL, VALUE_WIDTHS, check, mixer, step

try:
    from helmholtz.kernels import plain_forms
except ImportError:  # commits before there were kernels
    plain_forms = nullcontext
FORMS = {"kernels": nullcontext, "plain": plain_forms}
SHAPES = ((1, 256), (8, 2048))


class Count(TorchDispatchMode):
    """Counts the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.computing = Counter[Any](), Counter[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all[func] += 1
        name = func.overloadpacket.__name__
        if not (func.is_view or name == "_unsafe_view" or "empty" in name):
            self.computing[func] += 1
        return func(*args, **kwargs or {})


def counted(layer: nn.Module, batch: int, time: int, width: int = D_MODEL) -> Count:
    """Of one forward and backward pass."""
    x, cotangent = torch.randn(2, batch, time, width)
    with Count() as count:
        step(layer, x, cotangent)
    return count


def main() -> None:
    options = parse_options("layers_operations", __doc__, rounds=1)
    rows: list[dict[str, Any]] = []
    for prior in VALUE_WIDTHS:
        check(prior)
        layer = mixer(prior)
        for form, context in FORMS.items():
            for batch, time in SHAPES:
                x, cotangent = torch.randn(2, batch, time, D_MODEL)
                with context():
                    count = counted(layer, batch, time)
                    peak = peak_bytes(lambda x=x, cotangent=cotangent, layer=layer: step(layer, x, cotangent))
                rows.append(
                    {
                        "mixer": prior,
                        "form": form,
                        "B": batch,
                        "T": time,
                        "operations": count.all.total(),
                        "computing": count.computing.total(),
                        "peak_megabytes": peak / 2**20,
                    }
                )
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
