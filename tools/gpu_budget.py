"""What each layer must compute and move on a GPU, forward and backward, and how long that takes at least.

    python tools/gpu_budget.py              # the tables of docs/design/012-gpu-budget.md
    python tools/gpu_budget.py --write      # write them into that page

Counted, not measured; the layers are built without memory, and their matrices and the tensors between them are read
from the modules. ``tools/gpu.py`` divides these times by measured ones.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.mamba import MambaMixer
from helmholtz.layers.mlp import SwiGLU

PAGE = Path(__file__).resolve().parents[1] / "docs" / "design" / "012-gpu-budget.md"
MARKED = re.compile(r"(<!-- from gpu_budget -->\n).*?(\n<!-- end -->)", re.DOTALL)
TOKENS = 16_384
"""Of a call: 8 rows of 2,048 or 2 of 8,192."""
SIZES = tuple((width, time) for width in (768, 2048) for time in (2048, 8192))
HEAD, CHUNK = 64, 64
"""Width of a head, and tokens of a chunk of linear attention and of the state-space model."""
LAYERS = ("attention", "softmax", "linear", "gla", "rnn_softmax", "fem_mamba", "mamba", "swiglu")
"""Attention, the five priors of the Free Energy Mixer, a Mamba-2 mixer and a feed-forward of 8/3 of the width."""


@dataclass(frozen=True, slots=True)
class Card:
    """Peaks of a GPU, from its maker's data sheet or measured."""

    matmul: float
    """bf16 FLOP/s of dense products with float32 sums."""
    vector: float
    """float32 FLOP/s outside of products."""
    memory: float
    """Bytes per second."""


CARDS = {
    "A100": Card(312e12, 19.5e12, 2.04e12),
    "H100": Card(989e12, 67e12, 3.35e12),
    "H200": Card(989e12, 67e12, 4.8e12),
    "MI300X": Card(1307e12, 163e12, 5.3e12),
}
"""SXM modules of 80 GB (A100, H100) and 141 GB (H200); data sheets of NVIDIA (2021, 2023, 2024) and AMD (2023)."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Least work of a call of a layer, forward and backward."""

    parameters: int
    matmul: float
    vector: float
    bytes: float

    def seconds(self, card: Card) -> float:
        """The longest of the three, as if they overlapped."""
        return max(self.matmul / card.matmul, self.vector / card.vector, self.bytes / card.memory)

    def bound(self, card: Card) -> str:
        """Which of the three it is."""
        times = {"matmul": self.matmul / card.matmul, "vector": self.vector / card.vector}
        times["memory"] = self.bytes / card.memory
        return max(times, key=lambda name: times[name])


def build(name: str, width: int) -> nn.Module:
    """A layer of about the ``4 D^2`` parameters of attention; a Mamba-2 mixer has 6, a feed-forward 8."""
    heads = width // HEAD
    if name == "attention":
        return Attention(width, heads)
    if name == "swiglu":
        return SwiGLU(width, 8 * width // 3 // 64 * 64)
    if name == "mamba":
        return MambaMixer(width, d_inner=2 * width, d_state=HEAD, d_head=HEAD)
    prior = name.removeprefix("fem_")
    value = _value_width(prior, width, heads) if prior in ("rnn_softmax", "mamba") else None
    return FreeEnergyMixer(_fem(prior, width, heads, value))


def _fem(prior: str, width: int, heads: int, value: int | None) -> FreeEnergyMixerConfig:
    return FreeEnergyMixerConfig(d_model=width, n_heads=heads, prior=prior, d_head_v=value)  # type: ignore[arg-type]


def _value_width(prior: str, width: int, heads: int) -> int:
    """The even width of a head's values that brings a mixer nearest to ``4 D^2`` parameters."""

    def excess(value: int) -> int:
        with FakeTensorMode():
            return abs(parameters(FreeEnergyMixer(_fem(prior, width, heads, value))) - 4 * width**2)

    return min(range(HEAD // 2, HEAD + 1, 2), key=excess)


def parameters(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def floor(name: str, width: int, batch: int, time: int) -> Floor:
    """Of a call on ``batch`` rows of ``time`` tokens.

    Products: 6 FLOP per weight and token; what the read adds (``_read``). Bytes: float32 weights are read twice and
    their gradient is written; the input is read twice and its gradient written, the output written and its gradient
    read; each tensor between two matrices, in bf16, is written, read, read again in the backward pass, its gradient
    written and read; what a read keeps beside that is written and read.
    """
    with FakeTensorMode():
        layer = build(name, width)
        widths, weights = _between(layer, torch.empty(1, 2 * CHUNK, width))
    tokens = batch * time
    matmul, vector, kept = _read(name, layer, time)
    moved = 2 * (5 * sum(widths) + 3 * width + 2 * width + 2 * kept)
    return Floor(
        parameters(layer),
        tokens * (6 * weights + matmul),
        tokens * vector,
        tokens * moved + 12 * parameters(layer),
    )


def _between(layer: nn.Module, x: Tensor) -> tuple[list[int], int]:
    """Widths of the tensors that go into or come out of a matrix, but for the layer's own; weights of all matrices."""
    seen: dict[int, Tensor] = {}
    weights = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal weights
        weights += module.weight.numel()  # type: ignore[union-attr, operator]
        seen.update({id(t): t for t in (inputs[0], output)})

    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(note) for module in linears]
    y = layer(x)
    for hook in hooks:
        hook.remove()
    return [t.shape[-1] for t in seen.values() if t is not x and t is not y], weights


def _read(name: str, layer: nn.Module, time: int) -> tuple[float, float, float]:
    """Per token, forward and backward: FLOP of products, FLOP of vectors, numbers kept for the backward pass."""
    if name == "swiglu":
        return 0, 0, 0
    if name == "mamba":
        heads, state, value = layer.n_heads, layer.d_state, layer.d_head
        forward = CHUNK * state + heads * (CHUNK * value + 4 * state * value)
        return 3 * forward, 0, heads * state * value / CHUNK
    if name == "attention":
        return _pairs(time, layer.n_heads, layer.d_head, layer.d_head), 0, 0
    c = layer.config
    heads, value = c.n_heads, c.d_head_v
    if name == "softmax":
        return _pairs(time, heads, c.d_head, 2 * value), 0, 2 * heads * value
    if name in ("linear", "gla"):
        forward = heads * (CHUNK * (c.d_head + 2 * value) + 4 * c.d_head * (2 * value + 1))
        return 3 * forward, 0, 2 * heads * value + heads * c.d_head * (2 * value + 1) / CHUNK
    if name == "rnn_softmax":  # two exponentials and two recurrences with their mass
        return 0, 3 * 16 * heads * value, 3 * heads * value
    # a decay, three recurrences and their reads per channel and state
    return 0, 3 * 16 * heads * value * c.d_state, 3 * heads * value


def _pairs(time: int, heads: int, key: int, values: int) -> float:
    """A token's share of a causal read: two products forward; five backward, of which three are of keys' width."""
    return heads * (time + 1) / 2 * 2 * (4 * key + 3 * values)


def tables() -> str:
    """For each size, a line per layer."""
    parts = []
    for width, time in SIZES:
        head = f"D = {width}, T = {time:,}, {TOKENS // time} rows"
        columns = ["layer", "parameters / D²", "products, TFLOP", "vectors, GFLOP", "memory, GB"]
        lines = [f"**{head}**", "", f"| {' | '.join([*columns, *(f'{card}, ms' for card in CARDS)])} |"]
        lines.append("|---|" + "---:|" * (len(columns) - 1 + len(CARDS)))
        for name in LAYERS:
            found = floor(name, width, TOKENS // time, time)
            numbers = [f"{found.parameters / width**2:.2f}", f"{found.matmul / 1e12:.3f}"]
            numbers += [f"{found.vector / 1e9:.1f}", f"{found.bytes / 1e9:.2f}"]
            numbers += [f"{1e3 * found.seconds(card):.2f} ({found.bound(card)})" for card in CARDS.values()]
            lines.append(f"| {' | '.join([name, *numbers])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the page")
    found = tables()
    if parser.parse_args().write:
        PAGE.write_text(MARKED.sub(lambda m: m[1] + found + m[2], PAGE.read_text()))
    else:
        print(found)


if __name__ == "__main__":
    main()
