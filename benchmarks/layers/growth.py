"""How time and memory of each mixer grow with the length, forward and backward, and what a token of state costs.

Floor: a mixer of a linear prior touches each token a constant number of times, so time and memory per token should not
depend on the length; the state that a stream carries is constant for them and grows by K + V numbers per key/value
head and token for softmax.

    python benchmarks/layers/growth.py --threads 2 --keep-memory
"""

import sys
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from _timing import interleave, parse_options, peak_bytes, print_table, write_results
from speed import D_MODEL, VALUE_WIDTHS, check, mixer, step

LENGTHS = (1024, 4096, 16384)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, tuple):
        return sum(map(state_bytes, state))
    return sum(state_bytes(getattr(state, f.name)) for f in fields(state)) if is_dataclass(state) else 0


@torch.no_grad()
def stream_bytes(prior: str, time: int) -> int:
    layer = mixer(prior)
    return state_bytes(layer.step(torch.randn(1, time, D_MODEL), layer.init_state(1))[1])


def main() -> None:
    options = parse_options("layers_growth", __doc__, rounds=3)
    rows: list[dict[str, Any]] = []
    for prior in VALUE_WIDTHS:
        check(prior)
        layer = mixer(prior)
        for time in LENGTHS:
            x, cotangent = torch.randn(1, time, D_MODEL), torch.randn(1, time, D_MODEL)
            run = partial(step, layer, x, cotangent)
            seconds = interleave({prior: run}, rounds=options.rounds, warmup=1)
            rows.append(
                {
                    "mixer": prior,
                    "T": time,
                    "microseconds_per_token": 1e6 * seconds[prior] / time,
                    "peak_bytes_per_token": peak_bytes(run, keep_memory=options.keep_memory) / time,
                    "state_bytes": stream_bytes(prior, time),
                }
            )
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
