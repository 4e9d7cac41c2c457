"""Every native kernel against the plain form of its operation and against what the machine allows, float32 and bf16.

    python benchmarks/ops/kernels.py --threads 2 --keep-memory

Operations of a layer of 512 channels, 2 x 1024 tokens, and the draw of one token. The floor is the larger of two times:
a copy of as many bytes as have to move (inputs read and outputs written once, in backward inputs and their gradients
too), timed in turn with the operation, and its FLOPs at the rate of a product of matrices of 1024 x 1024. Exponentials
count only where FLOPs are given for them, 20 each.

An operation whose kernel is not there yet is left out; a kernel that no operation calls is an error.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import gate, interleave, parse_options, print_table, write_results

from helmholtz import kernels, ops
from helmholtz.models.sampling import SamplingSettings, next_tokens

BATCH, TIME = 2, 1024
D_MODEL, HEADS, WIDTH, TDC, CHUNK = 512, 8, 64, 32, 64
"""Width of the layer, heads, their keys and values, channels of the conditioning, steps of a chunk."""
SAMPLING = SamplingSettings(max_new_tokens=1, top_k=50, top_p=0.9)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = {
    "attention_step",
    "linear_step",
    "rnn_softmax_step",
    "rope_step",
    "selective_step",
    "softmax_step",
    "ssd_step",
    "token_energy",
}
"""A stream's step, a few microseconds of one layer's, and a solver's: ``layers/decode.py`` and
``models/equilibrium.py`` measure the whole of it."""
Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operation as a layer calls it."""

    call: Callable[..., Output]
    """Of the inputs; its results are differentiated."""
    inputs: Callable[[int, int], Sequence[Tensor]]
    """Of the batch and the number of steps."""
    wide: tuple[int, ...] = ()
    """Inputs that stay float32 among bf16 ones, as parameters do."""
    flops: Callable[[int, int], tuple[float, float]] = lambda b, t: (0.0, 0.0)
    """Of forward and of backward, where products or exponentials weigh more than memory."""
    products: bool = True
    """Whether these are of matrix products, which have a higher rate in bf16; all else is computed in float32."""

    def cast(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Floating inputs in that dtype, the wide ones only to float64."""
        narrow = dtype != torch.float64
        kept = (narrow and i in self.wide or not x.is_floating_point() for i, x in enumerate(inputs))
        return [x if keep else x.to(dtype) for keep, x in zip(kept, inputs, strict=True)]


def heads(batch: int, time: int, width: int = WIDTH) -> Tensor:
    """``B H T K`` as projections give it: time before heads in memory."""
    return torch.randn(batch, time, HEADS, width).transpose(1, 2)


def linear(batch: int, time: int) -> list[Tensor]:
    return [heads(batch, time).exp() / 8, heads(batch, time).exp() / 8, heads(batch, time, 2 * WIDTH + 1)]


def linear_flops(
    batch: int, time: int, *, keys: float = WIDTH, values: float = 2 * WIDTH + 1
) -> tuple[float, float]:
    forward = batch * time * HEADS * (CHUNK * (keys + values) + 4 * keys * values)
    return forward, 2 * forward


def attention_flops(batch: int, time: int, *, signals: int = 1) -> tuple[float, float]:
    pairs = batch * HEADS * time**2 * WIDTH  # half of the pairs, a multiplication and an addition
    return pairs * (1 + signals), pairs * (3 + 2 * signals)


def scan_flops(batch: int, time: int) -> tuple[float, float]:
    cells = batch * time * D_MODEL // 2 * 16
    return cells * (20 + 3 * 5), cells * (2 * 20 + 3 * 15)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, eps=1e-6)


def decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape)) / 16


CASES: dict[str, Case] = {
    "tilt_values": Case(
        call=lambda v, beta: ops.tilt_values(v, beta, cap=40.0),
        inputs=lambda b, t: (heads(b, t), torch.rand(HEADS, WIDTH)), wide=(1,),
    ),
    "modulated_split": Case(
        call=lambda joint, scale: tuple(ops.modulated_split(joint, scale, [D_MODEL] * 4)),
        inputs=lambda b, t: (torch.randn(b, t, 4 * D_MODEL), torch.randn(b, t, 4 * D_MODEL) / 4),
    ),
    "gated_read": Case(
        call=lambda mixed, *gates: ops.gated_read(mixed, *gates),
        inputs=lambda b, t: (
            torch.rand(b, HEADS, t, 2, WIDTH).transpose(1, 2) + 0.1, torch.rand(HEADS, WIDTH) + 0.5,
            torch.randn(b, t, HEADS, WIDTH), torch.randn(b, t, HEADS, WIDTH),
        ), wide=(1,),
    ),
    "first_order_scan": Case(
        call=lambda a, x: ops.first_order_scan(a, x)[0],
        inputs=lambda b, t: (torch.rand(b, t, TDC), torch.randn(b, t, TDC)),
    ),
    "causal_conv, silu": Case(
        call=lambda x, w, bias: ops.causal_conv(x, w, bias, activation="silu")[0],
        inputs=lambda b, t: (torch.randn(b, t, 2 * D_MODEL), torch.randn(2 * D_MODEL, 4), torch.randn(2 * D_MODEL)),
        wide=(1, 2),
    ),
    "rnn_softmax": Case(
        call=lambda k, signals: ops.rnn_softmax(k, signals)[0],
        inputs=lambda b, t: (torch.randn(b, t, D_MODEL), torch.randn(b, t, 2, D_MODEL)),
    ),
    "selective_scan": Case(
        call=lambda u, delta, a, *bc: ops.selective_scan(u, delta, a, *bc)[0],
        inputs=lambda b, t: (
            torch.randn(b, t, 3, D_MODEL // 2), torch.rand(b, t, D_MODEL // 2), -torch.rand(D_MODEL // 2, 16),
            torch.randn(b, t, 16), torch.randn(b, t, 16),
        ), wide=(2,), flops=scan_flops, products=False,
    ),
    "linear_attention": Case(
        call=lambda *x: ops.linear_attention(*x)[0], inputs=linear, flops=linear_flops,
    ),
    "linear_attention, head decay": Case(
        call=lambda *x: ops.linear_attention(*x)[0],
        inputs=lambda b, t: (*linear(b, t), decay(b, HEADS, t)), wide=(3,), flops=linear_flops,
    ),
    "linear_attention, channel decay": Case(
        call=lambda *x: ops.linear_attention(*x)[0],
        inputs=lambda b, t: (*linear(b, t), decay(b, HEADS, t, WIDTH)), wide=(3,), flops=linear_flops,
    ),
    "ssd": Case(
        call=lambda *x: ops.ssd(*x)[0],
        inputs=lambda b, t: (
            torch.randn(b, t, HEADS, WIDTH), 0.1 * torch.rand(b, t, HEADS), -torch.rand(HEADS),
            torch.randn(b, t, 16), torch.randn(b, t, 16),
        ), wide=(2,), flops=partial(linear_flops, keys=16, values=WIDTH),
    ),
    "free_energy_read": Case(
        call=ops.free_energy_read,
        inputs=lambda b, t: (*(heads(b, t) for _ in range(3)), torch.rand(HEADS, WIDTH) + 0.5), wide=(3,),
        flops=partial(attention_flops, signals=2),
    ),
    "softmax_attention": Case(
        call=ops.softmax_attention, inputs=lambda b, t: [heads(b, t) for _ in range(3)], flops=attention_flops,
    ),
    "rms_norm": Case(
        call=rms_norm, inputs=lambda b, t: (torch.randn(b, t, D_MODEL), torch.rand(D_MODEL)), wide=(1,),
    ),
    "swiglu": Case(call=ops.swiglu, inputs=lambda b, t: (torch.randn(b, t, 8 * D_MODEL // 3 // 64 * 128),)),
    "rope": Case(
        call=lambda x: ops.rope(x, torch.arange(x.shape[2])), inputs=lambda b, t: (heads(b, t),),
    ),
    "cross_entropy": Case(
        call=ops.cross_entropy, inputs=lambda b, t: (torch.randn(b, t, 8192), torch.randint(8192, (b, t))),
    ),
    "code_lookup": Case(
        call=ops.code_lookup,
        inputs=lambda b, t: (torch.randn(256, D_MODEL), torch.randint(256, (b, t)), torch.randn(b, t, 8)), wide=(0,),
        flops=lambda b, t: (0.0, 2.0 * b * t * 256 * D_MODEL),
    ),
    "next_tokens": Case(
        call=lambda logits, uniform: next_tokens(logits, SAMPLING, uniform),
        inputs=lambda b, t: (torch.randn(1, 8192), torch.rand(1, 1, dtype=torch.float64)), wide=(1,),
    ),
}  # fmt: skip


class Called(TorchDispatchMode):
    """The kernels that were called, without those of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "helmholtz":
            self.names.add(func._schema.name.removeprefix("helmholtz::"))
        return func(*args, **(kwargs or {}))


def called(case: Case) -> list[str]:
    with Called() as found:
        case.call(*(x.requires_grad_(x.is_floating_point()) for x in case.inputs(1, 2 * CHUNK)))
    return sorted(found.names & set(kernels.NAMES))


def both(case: Case, inputs: Sequence[Tensor], *, plain: bool) -> Callable[[], list[Tensor]]:
    """Forward and, where there is one, backward: results, then gradients."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    cotangents: list[Tensor] = []

    def run() -> list[Tensor]:
        with kernels.plain_forms() if plain else nullcontext():
            outputs = _tuple(case.call(*leaves))
            if not outputs[0].requires_grad:
                return [*outputs]
            if not cotangents:
                torch.manual_seed(0)
                cotangents.extend(torch.randn(x.shape).bfloat16().to(x.dtype) for x in outputs)
            return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents)]

    return run


def _tuple(output: Output) -> tuple[Tensor, ...]:
    return (output,) if torch.is_tensor(output) else tuple(output)


def check(name: str, dtype: torch.dtype) -> None:
    """The kernel against the plain form in float64, on a length that fills no chunk."""
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.cast(case.inputs(1, 130), dtype)
    exact = case.cast(inputs, torch.float64)
    found, expected = both(case, inputs, plain=False)(), both(case, exact, plain=True)()
    labels = [f"tensor {i}" for i in range(len(found))]
    actual, wanted = (dict(zip(labels, x, strict=True)) for x in (found, expected))
    gate(f"{name}, {dtype}", actual, wanted, budget=16 if dtype == torch.float32 else 2, dtype=dtype)


def product_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of the machine's best product."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def copy(num_bytes: int) -> Callable[[], Tensor]:
    """Moves that many bytes, half of them in and half of them out."""
    x = torch.ones(num_bytes // 8)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measure(name: str, dtype: str, rate: float, rounds: int) -> dict[str, Any]:
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.cast(case.inputs(BATCH, TIME), DTYPES[dtype])
    kernel, plain = (both(case, inputs, plain=form) for form in (False, True))
    outputs = _tuple(case.call(*inputs))
    forward_bytes = nbytes(inputs) + nbytes(outputs)
    all_bytes = forward_bytes
    if outputs[0].is_floating_point():
        all_bytes += forward_bytes + nbytes([x for x in inputs if x.is_floating_point()])

    @torch.no_grad()
    def forward() -> None:
        case.call(*inputs)

    candidates = {"forward": forward, "kernel": kernel, "plain": plain}
    copies = {"copied": copy(forward_bytes), "all copied": copy(all_bytes)}
    seconds = interleave(candidates | copies, rounds=rounds, warmup=1)
    flops = case.flops(BATCH, TIME)
    floor = max(seconds["copied"], flops[0] / rate), max(seconds["all copied"], sum(flops) / rate)
    return {
        "op": name,
        "dtype": dtype,
        "kernels": ", ".join(called(case)),
        "forward_ms": 1e3 * seconds["forward"],
        "forward_to_floor": seconds["forward"] / floor[0],
        "ms": 1e3 * seconds["kernel"],
        "plain_ms": 1e3 * seconds["plain"],
        "plain_to_kernel": seconds["plain"] / seconds["kernel"],
        "floor_ms": 1e3 * floor[1],
        "to_floor": seconds["kernel"] / floor[1],
        "bound": "memory" if floor[1] == seconds["all copied"] else "arithmetic",
    }


def main() -> None:
    options = parse_options("kernels", __doc__, rounds=7)
    if refusal := kernels.refusal():
        sys.exit(f"no kernel runs: {refusal}")
    found = {name: called(case) for name, case in CASES.items()}
    if missing := set(kernels.NAMES) - STEPS - {kernel for names in found.values() for kernel in names}:
        sys.exit(f"no operation of this benchmark calls {', '.join(sorted(missing))}")
    names = [name for name in CASES if found[name]]
    rates, rows = {name: product_rate(dtype) for name, dtype in DTYPES.items()}, []
    for dtype in DTYPES:
        print(f"products in {dtype}: {rates[dtype] / 1e9:.0f} GFLOP/s")
        for name in names:
            check(name, DTYPES[dtype])
            rate = rates[dtype if CASES[name].products else "float32"]
            rows.append(measure(name, dtype, rate, options.rounds))
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
