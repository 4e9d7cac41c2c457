"""Linear attention, ``S_t = e^{g_t} S_{t-1} + k_t v_t^T`` and ``o_t = S_t^T q_t``, in chunks of L = 64 steps.

With ``w_ij`` what decays from step j to step i of a chunk, ``a_i`` from its start to i and ``b_j`` from j to its end,

    P = (q k^T) w,  o = P v + (a q) S,  S' = a_L S + (b k)^T v.

Three phases: what each chunk adds to the state, all at once; the states before the chunks, one after another but all
their numbers at once; what each chunk reads, all at once. Backward is alike: the gradient of the states from the end,
then dq, dk, dg of each chunk and block of keys and dv of each chunk and block of values.

With `normalize` the values have one more column, of ones, by whose result the others are divided: the mass. It is no
column of a product but a sum in float32. States are kept in float32, a chunk's values first, then its masses, so that
rows stay whole lines. Decays are sums of logarithms over just the steps between, never differences: a restart is a
decay of -inf.

Floor: L/2 (K + V) + 2 K V multiply-adds per step forward, L K + 3/2 L (K + V) + 5 K V backward; q, k, v in and o out,
and 4 K V / L bytes of states per step, written, carried and read. Here whole squares of a chunk are multiplied, not
their lower halves, and P and its gradient are made again by every kernel that needs them. Products that have a factor
in float32 are taken to its accuracy (`Target.float32_dot`).
"""

from typing import Any

import torch
from torch import Tensor

from helmholtz.kernels.operators import CHUNK, _of_heads
from helmholtz.ops.triton._linear_attention import (
    _add,
    _carry,
    _decays_back,
    _keys_back,
    _masses,
    _queries_back,
    _read,
    _values_back,
)
from helmholtz.ops.triton._shared import launch, power_of_2, target, with_whole_rows

WIDEST, PART, NUMBERS = 32, 16, 256
"""Columns of a block of keys or values, steps of a part of a chunk, as many as registers hold of products whose factors
are split; and numbers of the state that a program carries along."""


def _block(width: int) -> int:
    return min(WIDEST, power_of_2(width, 16))


def _states(
    x: Tensor, y: Tensor, g: Tensor | None, mass: Tensor, dmass: Tensor | None, first: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    """The states before the chunks and after the last, or their gradients after the chunks and before the first."""
    batch, heads, steps, values = y.shape
    keys, columns, chunks, parts = x.shape[3], first.shape[3], -(-steps // CHUNK), batch * heads
    states, final = first.new_empty((batch, heads, chunks, keys, columns)), torch.empty_like(first)
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 8}
    grid = parts, chunks, -(-keys // blocks["KEYS"]) * -(-values // blocks["VALUES"])
    strides = *x.stride()[:3], *y.stride()[:3]
    launch(
        _add, grid, x, y, g, mass, dmass, states, steps, heads, keys, values, *strides, BACKWARD=backward,
        NORMALIZE=columns > values, PRECISION=target().float32_dot, L=CHUNK, **blocks,
    )  # fmt: skip
    launch(
        _carry, (parts, -(-keys * columns // NUMBERS)), states, first, final, g, steps, chunks, keys, values, columns,
        BACKWARD=backward, L=CHUNK, NUMBERS=NUMBERS, num_warps=2,
    )  # fmt: skip
    return states, final


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, strict: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    (batch, heads, steps, values), keys = v.shape, q.shape[3]
    g, state = None if log_decay is None else log_decay.contiguous(), state.contiguous()
    out = _of_heads(v, values, state.dtype)
    mass = state.new_empty((batch, heads, steps if normalize else 0))
    states, last = _states(k, v, g, mass, None, state, False)
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 4}
    launch(
        _read, (batch * heads, states.shape[2], -(-values // blocks["VALUES"])), q, k, v, g, states, out, mass,
        steps, heads, keys, values, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        STRICT=strict, NORMALIZE=normalize, PRECISION=target().float32_dot, L=CHUNK, PART=PART, **blocks,
    )  # fmt: skip
    return out, last, states, mass


def linear_attention_backward(
    dout: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
    out: Tensor, starts: Tensor, mass: Tensor, strict: bool, normalize: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    d, out, q, k, v = (with_whole_rows(x) for x in (dout, out, q, k, v))
    (batch, heads, steps, values), keys, chunks = v.shape, q.shape[3], starts.shape[2]
    parts, g = batch * heads, None if log_decay is None else log_decay.contiguous()
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 4}
    per_keys, per_values = (-(-n // b) for n, b in ((keys, blocks["KEYS"]), (values, blocks["VALUES"])))
    dmass = None
    if normalize:
        dmass = torch.empty_like(mass)
        sizes = steps, heads, values, *d.stride()[:3], *out.stride()[:3]
        launch(
            _masses,
            (parts, chunks),
            d,
            out,
            mass,
            dmass,
            *sizes,
            L=CHUNK,
            BLOCK=blocks["VALUES"],
            num_warps=4,
        )
    first = torch.zeros_like(state) if dlast is None else dlast.contiguous()
    dstates, dstate = _states(q, d, g, mass, dmass, first, True)
    dq, dk, dv = (_of_heads(x, x.shape[3], x.dtype) for x in (q, k, v))
    dg = None if g is None else g.new_empty((2 * per_keys + 1, *g.shape))
    of_queries, of_sources = (None, None) if dg is None else (dg[:per_keys], dg[per_keys:])
    sizes, options = (
        (steps, heads, keys, values),
        {"PRECISION": target().float32_dot, "L": CHUNK, "PART": PART, **blocks},
    )
    options |= {"STRICT": strict, "NORMALIZE": normalize}
    of_keys, of_d = (*q.stride()[:3], *k.stride()[:3]), d.stride()[:3]
    places = *sizes, *of_keys, *v.stride()[:3], *of_d
    inputs, grid = (q, k, v, g, d, mass, dmass), (parts, chunks, per_keys)
    launch(_queries_back, grid, *inputs, starts, dstates, dq, of_queries, *places, **options)
    launch(_keys_back, grid, *inputs, dstates, dk, of_sources, *places, **options)
    if dg is not None:
        launch(_decays_back, (parts, chunks), *inputs, dg[-1], *places, **options)
    launch(
        _values_back, (parts, chunks, per_values), q, k, g, d, mass, dstates, dv, *sizes, *of_keys, *of_d, **options
    )  # fmt: skip
    return dq, dk, dv, state.new_empty(0) if dg is None else dg.sum(0), dstate


def _call(
    new: Any,
    keys: int,
    values: int,
    narrow: torch.dtype,
    wide: torch.dtype,
    *,
    decay: bool = True,
    mass: bool = True,
) -> tuple[Any, ...]:
    q, k, v = (new(2, 3, 200, n, dtype=t) for n, t in ((keys, narrow), (keys, narrow), (values, wide)))
    return q, k, v, new(2, 3, 200) if decay else None, new(2, 3, keys, values + mass), not mass, mass


def _backward_call(new: Any, keys: int, values: int, *others: Any, **options: Any) -> tuple[Any, ...]:
    *inputs, strict, mass = _call(new, keys, values, *others, **options)
    out, starts = new(2, 3, 200, values), new(2, 3, 4, keys, values + mass)
    return out, None, *inputs, out, starts, new(2, 3, 200 if mass else 0), strict, mass


_SORTS: dict[str, tuple[tuple[Any, ...], dict[str, bool]]] = {
    "bf16 signals fp32 64 128": ((64, 128, torch.bfloat16, torch.float32), {}),
    "bf16 128 128": ((128, 128, torch.bfloat16, torch.bfloat16), {}),
    "fp16 256 256": ((256, 256, torch.float16, torch.float16), {}),
    "fp32 64 128": ((64, 128, torch.float32, torch.float32), {}),
    "bf16 64 64 no decay": ((64, 64, torch.bfloat16, torch.float32), {"decay": False}),
    "bf16 16 64 strict": ((16, 64, torch.bfloat16, torch.bfloat16), {"mass": False}),
}
CALLS: dict[str, tuple[str, Any]] = {}
for _label, (_sizes, _options) in _SORTS.items():
    CALLS[_label] = ("linear_attention", lambda new, s=_sizes, o=_options: _call(new, *s, **o))
    CALLS[_label + " backward"] = (
        "linear_attention_backward",
        lambda new, s=_sizes, o=_options: _backward_call(new, *s, **o),
    )
