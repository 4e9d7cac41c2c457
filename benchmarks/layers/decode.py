"""Time of one decoding step of each mixer against the length of the context, next to plain attention.

Floor: the projections of one token read 4 D^2 weights; softmax also reads its cache. Linear priors read a state of
constant size, so their step should cost the same after 64 tokens and after 4,096.

    python benchmarks/layers/decode.py --threads 2
    python tools/against.py 252ba62 benchmarks/layers/decode.py --threads 2     # beside another commit
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from _timing import gate, interleave, parse_options, print_table, write_results
from speed import D_MODEL, HEADS, VALUE_WIDTHS, mixer

from helmholtz.layers import AbstractMixer, Attention

CONTEXTS = (64, 1024, 4096)
STEPS = 32
"""Steps per timed run."""
GOAL = 1.3
"""Attention steps that a step after 64 tokens may take."""


def check(name: str, layer: AbstractMixer) -> None:
    """Prefill and single steps against one whole pass."""
    x = torch.randn(1, 40, D_MODEL)
    y, state = layer.step(x[:, :30], layer.init_state(1))
    parts = [y]
    for token in x[:, 30:].split(1, dim=1):
        y, state = layer.step(token, state)
        parts.append(y)
    gate(name, {"y": torch.cat(parts, dim=1)}, {"y": layer(x)}, budget=200)


def decoding(layer: AbstractMixer, context: int) -> Callable[[], Tensor]:
    """A run of ``STEPS`` steps after ``context`` tokens, always from the same state."""
    state = layer.init_state(1)
    for chunk in torch.randn(1, context, D_MODEL).split(1024, dim=1):
        _, state = layer.step(chunk, state)
    token = torch.randn(1, 1, D_MODEL)

    def run() -> Tensor:
        current, y = state, token
        for _ in range(STEPS):
            y, current = layer.step(token, current)
        return y

    return run


@torch.no_grad()
def main() -> None:
    options = parse_options("layers_decode", __doc__, rounds=9)
    layers: dict[str, AbstractMixer] = {"attention": Attention(D_MODEL, HEADS)}
    layers |= {prior: mixer(prior) for prior in VALUE_WIDTHS}
    for name, layer in layers.items():
        check(name, layer)
    rows: list[dict[str, Any]] = [{"mixer": name} for name in layers]
    for context in CONTEXTS:
        seconds = interleave(
            {name: decoding(layer, context) for name, layer in layers.items()}, rounds=options.rounds
        )
        for row in rows:
            row[f"microseconds_at_{context}"] = 1e6 * seconds[row["mixer"]] / STEPS
            row[f"to_attention_at_{context}"] = seconds[row["mixer"]] / seconds["attention"]
    print_table(rows)
    print(f"goal: {GOAL} attention steps at {CONTEXTS[0]}")
    write_results(options, rows)


if __name__ == "__main__":
    main()
