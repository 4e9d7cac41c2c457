"""Schemas and fake rules of the kernels: operators ``helmholtz::name``, implemented for CPU tensors in ``csrc/``, some
of them for CUDA tensors in ``ops/triton/``.

What is trained through has a backward operator beside it, which has no derivative of its own: asking for one raises.
A stream's steps, sampling and the token energy have none and say so. Names carry the rule of differentiation
(``gradients.py``): the backward operator takes the arguments and results of the forward one that it needs under their
names, the gradient of the result ``y`` as ``dy``, and returns that of the argument ``x`` as ``dx``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("helmholtz", "DEF")
NAMES: list[str] = []
"""Of the operators, without those of the backward pass."""


def _define(schema: str, fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"helmholtz::{name}", fake, lib=LIBRARY)
    if not name.endswith("_backward"):
        NAMES.append(name)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _scan(decay: Tensor, x: Tensor, state: Tensor, logits: bool) -> tuple[Tensor, ...]:
    return state.new_empty(x.shape), *_like(state)


_define("scan(Tensor decay, Tensor x, Tensor state, bool logits) -> (Tensor h, Tensor last)", _scan)
_define(
    "scan_backward(Tensor dh, Tensor? dlast, Tensor decay, Tensor h, Tensor state, bool logits) "
    "-> (Tensor ddecay, Tensor dx, Tensor dstate)",
    lambda dh, dlast, decay, h, state, logits: (
        *(decay.new_empty(decay.shape) for _ in range(2)),
        *_like(state),
    ),
)


_define(
    "modulate(Tensor joint, Tensor scale, int[] widths) -> (Tensor[] parts)",
    lambda joint, scale, widths: [joint.new_empty(*joint.shape[:-1], width) for width in widths],
)
_define(
    "modulate_backward(Tensor[] dparts, Tensor joint, Tensor scale) -> (Tensor djoint, Tensor dscale)",
    lambda grads, joint, scale: _like(joint, scale),
)


def _tilt(v: Tensor, beta: Tensor, cap: float, apart: bool) -> Tensor:
    batch, groups, steps, width = v.shape
    if apart:
        return beta.new_empty(batch, steps, 2, groups, width).permute(0, 3, 1, 2, 4)
    return beta.new_empty(batch, steps, groups, 2, width).transpose(1, 2)


_define("tilt(Tensor v, Tensor beta, float cap, bool apart) -> (Tensor signals)", _tilt)
_define(
    "tilt_backward(Tensor dsignals, Tensor v, Tensor beta, float cap) -> (Tensor dv, Tensor dbeta)",
    lambda dsignals, v, beta, cap: (_of_heads(v, v.shape[3], v.dtype), *_like(beta)),
)


def _gated_read(mixed: Tensor, beta: object, *gates_and_eps: object) -> Tensor:
    stored = next((x.dtype for x in gates_and_eps if isinstance(x, Tensor)), mixed.dtype)
    return mixed.new_empty(*mixed.shape[:3], mixed.shape[4], dtype=stored)


def _gated_read_backward(dy: Tensor, mixed: Tensor, *inputs_and_eps: Any) -> tuple[Tensor, ...]:
    others = (mixed.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs_and_eps[:-1])
    return torch.empty_like(mixed), *others


_define(
    "gated_read(Tensor mixed, Tensor? beta, Tensor? inner, Tensor? outer, Tensor? own, float eps) "
    "-> (Tensor y)",
    _gated_read,
)
_define(
    "gated_read_backward(Tensor dy, Tensor mixed, Tensor? beta, Tensor? inner, Tensor? outer, Tensor? own, float eps) "
    "-> (Tensor dmixed, Tensor dbeta, Tensor dinner, Tensor douter, Tensor down)",
    _gated_read_backward,
)
_define(
    "rnn_softmax(Tensor k, Tensor signals, Tensor max, Tensor sums, Tensor? reset) "
    "-> (Tensor averaged, Tensor last, Tensor top, Tensor inverse)",
    lambda k, signals, max, sums, reset: (
        *_like(signals, sums),
        *(signals.new_empty(k.shape) for _ in range(2)),
    ),
)
_define(
    "rnn_softmax_backward(Tensor daveraged, Tensor? dlast, Tensor k, Tensor signals, Tensor max, Tensor? reset, "
    "Tensor averaged, Tensor top, Tensor inverse) -> (Tensor dk, Tensor dsignals, Tensor dsums)",
    lambda dy, dsums, k, signals, *_: (
        *_like(k, signals),
        signals.new_empty(signals.shape[0], signals.shape[2] + 1, signals.shape[3]),
    ),
)
_define(
    "rope_table(Tensor positions, int width, float theta) -> (Tensor, Tensor)",
    lambda positions, width, _: tuple(
        positions.new_empty(*positions.shape, width, dtype=torch.float32) for _ in range(2)
    ),
)
_define(
    "sample(Tensor logits, Tensor uniform, float temperature, int top_k, float top_p) -> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.long),
)


def _attention_step(joint: Tensor, cos: object, sin: object, keys: Tensor, *others: Any) -> Tensor:
    return joint.new_empty(*joint.shape[:2], others[-1] * keys.shape[3])


_define(
    "attention_step(Tensor joint, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor? key_mask, "
    "int before, int heads) -> Tensor",
    _attention_step,
)


def _softmax_step(q: Tensor, k: object, v: object, beta: object, *others: Any) -> Tensor:
    keys, values = others[2:4]
    shape = (*q.shape[:2], q.shape[2] // keys.shape[3], 1 if beta is None else 2, values.shape[3])
    return q.new_empty(shape, dtype=_opmath(q)).transpose(1, 2)


_define(
    "softmax_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? cos, Tensor? sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? key_mask, int before, float cap) -> Tensor",
    _softmax_step,
)
_define(
    "ssd_step(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, Tensor state, "
    "bool strict) -> (Tensor, Tensor)",
    lambda x, delta, A, B, C, D, gate, state, strict: (
        x.new_empty(x.shape),
        x.new_empty(state.shape, dtype=_opmath(x)),
    ),
)
BLOCK, KEPT = 16, 32
"""Channels that the selective scan works on at once, and steps from one state that it keeps to the next."""


def _signals(like: Tensor, dtype: torch.dtype) -> Tensor:
    batch, steps, signals, heads, width = like.shape
    return like.new_empty(batch, steps, heads, signals, width, dtype=dtype).transpose(2, 3)


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: object,
    state: Tensor,
    reset: object,
    normalize: bool,
) -> object:
    (batch, steps, channels), signals = delta.shape, state.shape[1]
    kept = delta.new_empty(batch * -(-channels // BLOCK), -(-steps // KEPT), A.shape[1] * signals * BLOCK)
    mass = delta.new_empty(batch, steps if normalize else 0, channels)
    return _signals(u, delta.dtype), *_like(state), kept, mass


_define(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor state, Tensor? reset, "
    "bool normalize) -> (Tensor y, Tensor last, Tensor kept, Tensor mass)",
    _selective_scan,
)
_define(
    "selective_scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor state, Tensor? reset, Tensor y, Tensor kept, Tensor mass, bool normalize) "
    "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dstate)",
    lambda dy, dlast, u, delta, A, B, C, D, state, *_: (
        _signals(u, u.dtype),
        *_like(delta, A, B, C),
        delta.new_empty(0 if D is None else D.shape),
        *_like(state),
    ),
)
_define(
    "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor? mask, Tensor? reset, bool silu) "
    "-> (Tensor y, Tensor last)",
    lambda x, weight, bias, state, *_: _like(x, state),
)
_define(
    "causal_conv_backward(Tensor dy, Tensor? dlast, Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor? mask, "
    "Tensor? reset, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)",
    lambda dy, dlast, x, weight, bias, state, *_: _like(x, weight, bias, state),
)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return *_like(x), weight.new_empty(x.shape[:-1])


_define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor scales)", _rms_norm)
_define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scales) -> (Tensor dx, Tensor dweight)",
    lambda dy, x, weight, scales: _like(x, weight),
)
PAGE, LINE = 4096, 64
"""Bytes."""


def _empty_rows(like: Tensor) -> Tensor:
    """Of the shape of ``like``; rows that would lie whole pages apart are moved: they share one set of each cache."""
    width = like.shape[-1]
    apart = 0 if width * like.element_size() % PAGE else LINE // like.element_size()
    return like.new_empty(*like.shape[:-1], width + apart)[..., :width]


_define("swiglu(Tensor gate_up) -> (Tensor y)", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_define(
    "swiglu_backward(Tensor dy, Tensor gate_up) -> (Tensor dgate_up)",
    lambda dy, gate_up: _empty_rows(gate_up),
)


def _rope(
    joint: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, heads_first: bool
) -> tuple[Tensor, ...]:
    batch, time, _, width = joint.shape
    if heads_first:
        return tuple(joint.new_empty(batch, n, time, width) for n in (heads, groups, groups))
    return tuple(joint.new_empty(batch, time, n, width).transpose(1, 2) for n in (heads, groups, groups))


_define(
    "rope(Tensor joint, Tensor cos, Tensor sin, int heads, int groups, bool heads_first) "
    "-> (Tensor q, Tensor k, Tensor v)",
    _rope,
)
_define(
    "rope_backward(Tensor dq, Tensor? dk, Tensor? dv, Tensor cos, Tensor sin) -> (Tensor djoint)",
    lambda q, k, v, *_: q.new_empty(
        q.shape[0], q.shape[2], q.shape[1] + (0 if k is None else 2 * k.shape[1]), q.shape[3]
    ),
)


def _cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=wide), logits.new_empty(len(logits), dtype=wide)


_define(
    "code_lookup(Tensor table, Tensor code, Tensor logits) -> (Tensor y)",
    lambda table, code, logits: table.new_empty(*code.shape, table.shape[1]),
)
_define(
    "code_lookup_backward(Tensor dy, Tensor table, Tensor code, Tensor logits) "
    "-> (Tensor dtable, Tensor dlogits)",
    lambda dy, table, code, logits: _like(table, logits),
)
_define(
    "cross_entropy(Tensor logits, Tensor targets, int ignored) -> (Tensor loss, Tensor totals)",
    _cross_entropy,
)
_define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor totals, int ignored) "
    "-> (Tensor dlogits)",
    lambda dloss, logits, *_: _like(logits)[0],
)
CHUNK = 64
"""Steps of linear attention from one state that is kept to the next."""


def _of_heads(like: Tensor, width: int | torch.SymInt, dtype: torch.dtype) -> Tensor:
    batch, heads, steps, _ = like.shape
    return like.new_empty(batch, steps, heads, width, dtype=dtype).transpose(1, 2)


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: object, state: Tensor, strict: bool, normalize: bool
) -> tuple[Tensor, ...]:
    (batch, heads, steps, width), dtype = v.shape, state.dtype
    starts = state.new_empty(batch, heads, -(-steps // CHUNK), *state.shape[2:])
    mass = state.new_empty(batch, heads, steps if normalize else 0)
    return _of_heads(v, width, dtype), *_like(state), starts, mass


def _linear_attention_backward(
    dout: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    grads = (_of_heads(x, x.shape[3], x.dtype) for x in (q, k, v))
    return *grads, state.new_empty(0) if g is None else g.new_empty(g.shape), *_like(state)


_define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor state, bool strict, bool normalize) "
    "-> (Tensor out, Tensor last, Tensor starts, Tensor mass)",
    _linear_attention,
)
_define(
    "linear_attention_backward(Tensor dout, Tensor? dlast, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor state, Tensor out, Tensor starts, Tensor mass, bool strict, bool normalize) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dstate)",
    _linear_attention_backward,
)


def _opmath(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _softmax_read(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    batch, heads, times, _width = q.shape
    signals = 1 if beta is None else 2
    mixed = q.new_empty(batch, times, heads, signals, v.shape[-1], dtype=_opmath(q)).transpose(1, 2)
    return mixed, q.new_empty(batch, heads, times, dtype=_opmath(q))


_define(
    "softmax_read(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? key_mask, Tensor? cu_seqlens, bool causal, "
    "float cap) -> (Tensor mixed, Tensor lse)",
    _softmax_read,
)
_define(
    "softmax_read_backward(Tensor dmixed, Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor mixed, Tensor lse, bool causal, float cap) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta)",
    lambda dmixed, q, k, v, beta, *_: (
        *(_of_heads(x, x.shape[3], x.dtype) for x in (q, k, v)),
        dmixed.new_empty(0) if beta is None else beta.new_empty(beta.shape),
    ),
)


def _step(v: Tensor, beta: object, *states: Tensor) -> tuple[Tensor, ...]:
    batch, heads, _, width = v.shape
    signals = 1 if beta is None else 2
    mixed = states[0].new_empty(batch, 1, heads, signals, width).transpose(1, 2)
    return mixed, *_like(*states)


_define(
    "linear_step(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? cos, Tensor? sin, Tensor state, "
    "float eps, float cap, float temperature) -> (Tensor, Tensor)",
    lambda q, k, v, decay, beta, cos, sin, state, *_: _step(v, beta, state),
)
_define(
    "rnn_softmax_step(Tensor k, Tensor v, Tensor? beta, Tensor? cos, Tensor? sin, Tensor max, Tensor sums, float cap) "
    "-> (Tensor, Tensor, Tensor)",
    lambda k, v, beta, cos, sin, max, sums, cap: _step(v, beta, max, sums),
)
_define(
    "selective_step(Tensor v, Tensor delta, Tensor B, Tensor C, Tensor A, Tensor D, Tensor? beta, Tensor state, "
    "float eps, float cap) -> (Tensor, Tensor)",
    lambda v, delta, B, C, A, D, beta, state, *_: _step(v, beta, state),
)


def _rope_step(features: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    width = cos.shape[-1]
    return [x.new_empty(len(x), x.shape[2] // width, 1, width) for x in features]


_define("rope_step(Tensor[] features, Tensor cos, Tensor sin) -> Tensor[]", _rope_step)
_define(
    "token_energy(Tensor z, Tensor u, Tensor a, Tensor gate, Tensor delta, Tensor drive, Tensor overlaps, "
    "Tensor? log_prior, Tensor kappa, Tensor strength, float beta) -> (Tensor, Tensor, Tensor)",
    lambda z, u, a, gate, delta, drive, overlaps, *_: (*_like(drive, overlaps), z.new_empty(len(z))),
)
