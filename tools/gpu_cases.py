"""What each operator with a kernel is asked on a device, and how its answers are judged: by its plain form in float64.

One table, ``CASES``: by operator, calls of the public function that dispatches to it. An operator that has a GPU kernel
and no case here is an error of ``tools/gpu.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.binary_latent import code_lookup
from helmholtz.ops.causal_conv import causal_conv
from helmholtz.ops.free_energy import softmax_read, tilt_values
from helmholtz.ops.gated_read import gated_read
from helmholtz.ops.linear_attention import linear_attention, linear_average
from helmholtz.ops.losses import cross_entropy
from helmholtz.ops.modulate import modulated_split
from helmholtz.ops.rms_norm import rms_norm
from helmholtz.ops.rnn_softmax import rnn_softmax
from helmholtz.ops.rope import rope_table, rotate_split
from helmholtz.ops.scan import first_order_scan, leaky_scan
from helmholtz.ops.selective_scan import selective_average, selective_scan
from helmholtz.ops.ssd import ssd
from helmholtz.ops.swiglu import swiglu

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative error (2-norm) of an output or gradient; float32 sums of any order are far below."""
SMALL = 0.05
"""Root mean square below which a tensor counts as 0: what cancels exactly, as with one token."""


@dataclass(frozen=True, slots=True)
class Case:
    """A call: of the inputs' shapes, those in ``wide`` stay float32 beside narrow ones, as a module's parameters do."""

    label: str
    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    wide: tuple[int, ...] = ()
    prepare: Callable[[list[Tensor]], list[Tensor]] = list
    """Brings normal random numbers into the range of the arguments."""


def _positive(*places: int, scale: float = 1.0) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda xs: [scale * x.abs() + 0.05 if i in places else x for i, x in enumerate(xs)]


def _negative(*places: int, scale: float = 0.1) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda xs: [-scale * x.abs() - 1e-3 if i in places else x for i, x in enumerate(xs)]


def _mask(q: Tensor, keys: int) -> Tensor:
    """Keys of the first row hidden up to the middle: with a causal read its first tokens see nothing."""
    mask = torch.ones(len(q), keys, dtype=torch.bool, device=q.device)
    mask[0, : keys // 2] = False
    return mask


def _packed(x: Tensor, time: int) -> Tensor:
    return torch.tensor([0, 1, time // 3, time], dtype=torch.int32, device=x.device)


def _reset(x: Tensor, dim: int = 1) -> Tensor:
    reset = torch.zeros(len(x), x.shape[dim], dtype=torch.bool, device=x.device)
    reset[:, x.shape[dim] // 3] = True
    return reset


def _read(
    time: int, heads: int, groups: int, key: int, value: int, scale: float = 1.0, **options: Any
) -> Case:
    batch = 1 if options.get("packed") else 2

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return softmax_read(
            q, k, v, beta, cap=40.0, causal=options.get("causal", True),
            key_mask=_mask(q, time) if options.get("mask") else None,
            cu_seqlens=_packed(q, time) if options.get("packed") else None,
        )  # fmt: skip

    shapes = (
        (batch, heads, time, key),
        (batch, groups, time, key),
        (batch, groups, time, value),
        (groups, value),
    )
    label = f"T={time} H={heads} G={groups} K={key} V={value} scale={scale} {options or ''}".strip()
    return Case(label, call, shapes, (3,), _positive(3, scale=scale))


def _attention(**options: Any) -> Case:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, key_mask=_mask(q, 100) if options else None)

    return Case(
        f"attention {options or ''}".strip(), call, ((2, 4, 100, 64), (2, 2, 100, 64), (2, 2, 100, 64))
    )


def _gla(
    time: int, key: int, value: int, decay: Sequence[int] | None, average: bool, reset: bool = False
) -> Case:
    function = linear_average if average else linear_attention
    shapes: list[tuple[int, ...]] = [(2, 3, time, key), (2, 3, time, key), (2, 3, time, value)]
    if decay is not None:
        shapes.append((2, 3, time, *decay))

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Any:
        if average:
            q, k = q.abs() + 0.05, k.abs() + 0.05
        return function(q, k, v, log_decay, reset=_reset(q, 2) if reset else None)

    label = f"T={time} K={key} V={value} decay={decay} average={average} reset={reset}"
    return Case(label, call, tuple(shapes), (), _negative(3))


def _selective(time: int, average: bool) -> Case:
    shapes = ((2, time, 2, 3, 16), (2, time, 48), (48, 16), (2, time, 16), (2, time, 16), (48,))

    def prepare(xs: list[Tensor]) -> list[Tensor]:
        u, delta, a, b, c, d = xs
        return [u, 0.2 * delta.abs() + 0.01, -a.abs() - 0.1, b.abs() + 0.05, c.abs() + 0.05, d.abs()]

    def call(u: Tensor, *others: Tensor) -> Any:
        return (
            selective_average(u, *others)
            if average
            else selective_scan(u.flatten(3), *others, reset=_reset(u))
        )

    return Case(f"T={time} average={average}", call, shapes, (2, 5), prepare)


def _ssd(time: int) -> Case:
    shapes = ((2, time, 4, 64), (2, time, 4), (4,), (2, time, 64), (2, time, 64), (4,))

    def prepare(xs: list[Tensor]) -> list[Tensor]:
        return [xs[0], 0.2 * xs[1].abs() + 0.01, -xs[2].abs() - 0.1, *xs[3:]]

    return Case(f"state-space duality T={time}", ssd, shapes, (2, 5), prepare)


def _rotated(joint: Tensor) -> Any:
    cos, sin = rope_table(torch.arange(joint.shape[1], device=joint.device), joint.shape[-1])
    return rotate_split(joint, cos, sin, 4, 2)


CASES: dict[str, list[Case]] = {
    "softmax_read": [
        _read(130, 4, 4, 64, 32),
        _read(1, 2, 1, 32, 32),
        _read(257, 4, 2, 128, 64),
        _read(70, 2, 2, 64, 32, 30.0),
        _read(130, 4, 4, 64, 32, 0.002),
        _read(100, 4, 2, 64, 32, mask=True),
        _read(100, 4, 4, 64, 32, causal=False),
        _read(100, 4, 4, 64, 32, packed=True),
        _read(64, 2, 2, 32, 256),
        _attention(),
        _attention(mask=True),
    ],
    "tilt": [
        Case(
            "one beta",
            lambda v, beta: tilt_values(v, beta, cap=40.0),
            ((2, 4, 100, 32), (4, 32)),
            (1,),
            _positive(1),
        ),
        Case(
            "at the cap",
            lambda v, beta: tilt_values(v, beta, cap=4.0, signals_first=True),
            ((2, 3, 33, 24), (3, 24)),
            (1,),
            _positive(1, scale=5.0),
        ),
    ],
    "gated_read": [
        Case(
            "all gates",
            lambda m, beta, i, o: gated_read(m, beta, i, o),
            ((2, 65, 4, 2, 32), (4, 32), (2, 65, 4, 32), (2, 65, 4, 32)),
            (1,),
            lambda xs: [
                torch.stack([xs[0][..., 0, :], xs[0][..., 1, :].abs() + 0.1], -2),
                xs[1].abs() + 0.05,
                *xs[2:],
            ],
        ),
        Case("the mean", lambda m, o: gated_read(m, None, None, o), ((2, 65, 4, 1, 32), (2, 65, 4, 32))),
    ],
    "modulate": [
        Case("split", lambda j, s: modulated_split(j, s, (96, 32, 64)), ((2, 130, 192), (2, 130, 192)))
    ],
    "scan": [
        Case("leaky", lambda r, x: leaky_scan(r, x, reset=_reset(x)), ((2, 300, 48), (2, 300, 48))),
        Case("decays", lambda d, x: first_order_scan(d.sigmoid(), x), ((1, 1000, 24), (1, 1000, 24))),
        Case("one token", lambda r, x: leaky_scan(r, x), ((2, 1, 24), (2, 1, 24))),
    ],
    "rnn_softmax": [
        Case("two signals", lambda k, s: rnn_softmax(k, s)[0], ((2, 300, 64), (2, 300, 2, 64))),
        Case(
            "resets, large keys",
            lambda k, s: rnn_softmax(8 * k, s, reset=_reset(k))[0],
            ((2, 65, 40), (2, 65, 1, 40)),
        ),
    ],
    "selective_scan": [_selective(130, True), _selective(65, False), _selective(1, True)],
    "linear_attention": [
        _gla(200, 64, 64, None, True),
        _gla(200, 64, 64, (), True),
        _gla(130, 64, 64, (), False, True),
        _gla(1, 64, 64, (), True),
        _gla(65, 128, 128, (), True),
        _ssd(200),
    ],
    "causal_conv": [
        Case(
            "silu",
            lambda x, w, b: causal_conv(x, w, b, activation="silu", reset=_reset(x)),
            ((2, 131, 96), (96, 4), (96,)),
            (1, 2),
        ),
        Case("one token", lambda x, w: causal_conv(x, w), ((2, 1, 33), (33, 3)), (1,)),
    ],
    "rms_norm": [Case("rows", lambda x, w: rms_norm(x, w, eps=1e-6), ((2, 65, 768), (768,)), (1,))],
    "swiglu": [Case("halves", swiglu, ((2, 65, 512),))],
    "rope": [Case("grouped", _rotated, ((2, 65, 8, 64),))],
    "code_lookup": [
        Case(
            "256 codes",
            lambda t, bits: code_lookup(t, torch.arange(65, device=t.device).expand(2, 65) * 3, bits),
            ((256, 64), (2, 65, 8)),
            (0, 1),
        ),
    ],
    "cross_entropy": [
        Case(
            "5,000 ids",
            lambda x: cross_entropy(x, torch.arange(65, device=x.device).expand(2, 65) * 70),
            ((2, 65, 5000),),
        ),
    ],
}
"""By the operator that the call dispatches to."""


def judged(device: torch.device) -> Iterator[tuple[str, str, torch.dtype, Callable[[], dict[str, Any]]]]:
    """Operator, label, dtype, and what measures the case; operators with a GPU kernel come first."""
    narrow = [torch.bfloat16] if device.type == "cpu" else [torch.bfloat16, torch.float16]
    for operator in sorted(CASES, key=lambda name: name not in kernels.gpu.MODULES):
        for case in CASES[operator]:
            for dtype in (torch.float32, *narrow):
                yield operator, case.label, dtype, lambda c=case, d=dtype: measure(c, d, device)  # type: ignore[misc]


def measure(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The largest error of a case over outputs and gradients, and which it is of."""
    generator = torch.Generator().manual_seed(0)
    exact = case.prepare(
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
    )
    dtypes = [torch.float32 if i in case.wide else dtype for i in range(len(exact))]
    given = [x.to(d) for x, d in zip(exact, dtypes, strict=True)]
    got = _outputs_and_gradients(case, [x.to(device) for x in given])
    with kernels.plain_forms():
        want = _outputs_and_gradients(case, [x.double() for x in given])
    errors = {}
    for name, value in got.items():
        a, b = value.detach().cpu().double(), want[name].detach()
        error = float((a - b).norm() / b.norm().clamp(min=SMALL * b.numel() ** 0.5))
        errors[name] = error if bool(a.isfinite().all()) else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    return {"error": errors[worst], "of": worst, "limit": LIMITS[dtype], "ok": errors[worst] <= LIMITS[dtype]}


def _outputs_and_gradients(case: Case, inputs: list[Tensor]) -> dict[str, Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    found = case.call(*inputs)
    outputs = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    named = {f"output {i}": x for i, x in enumerate(outputs)}
    return named | {f"gradient {i}": x for i, x in enumerate(gradients)}
