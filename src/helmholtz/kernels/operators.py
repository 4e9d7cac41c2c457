"""Schemas and fake rules of the kernels: operators ``helmholtz::name``, implemented for CPU tensors in ``csrc/``.

Each has a backward operator beside it, which has no derivative of its own: asking for one raises.
"""

from collections.abc import Callable

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


_define(
    "scan(Tensor decay, Tensor x, Tensor state) -> (Tensor, Tensor)", lambda decay, x, state: _like(x, state)
)
_define(
    "scan_backward(Tensor dh, Tensor dlast, Tensor decay, Tensor h, Tensor state) -> (Tensor, Tensor, Tensor)",
    lambda dh, dlast, decay, h, state: _like(h, h, state),
)


def _gated_read_backward(
    dy: Tensor, mixed: Tensor, beta: Tensor, inner: Tensor | None, outer: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dmixed = _like(mixed.transpose(1, 2))[0].transpose(1, 2)
    gates = (x.new_empty(x.shape) if x is not None else mixed.new_empty(0) for x in (inner, outer))
    return dmixed, beta.new_empty(beta.shape), *gates


_define(
    "gated_read(Tensor mixed, Tensor beta, Tensor? inner, Tensor? outer, float eps) -> Tensor",
    lambda mixed, beta, inner, outer, eps: _like(mixed[:, :, :, 0])[0],
)
_define(
    "gated_read_backward(Tensor dy, Tensor mixed, Tensor beta, Tensor? inner, Tensor? outer, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _gated_read_backward,
)
_define(
    "rnn_softmax(Tensor k, Tensor signals, Tensor max, Tensor sums, Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda k, signals, max, sums, reset: _like(signals, sums, k, k),
)
_define(
    "rnn_softmax_backward(Tensor daveraged, Tensor dsums, Tensor k, Tensor signals, Tensor max, Tensor? reset, "
    "Tensor averaged, Tensor top, Tensor inverse) -> (Tensor, Tensor, Tensor)",
    lambda dy, dsums, k, signals, *_: _like(k, signals, dsums),
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
_define(
    "segment_decays(Tensor log_decay) -> Tensor",
    lambda log_decay: log_decay.new_empty(*log_decay.shape, log_decay.shape[-1]),
)
_define(
    "segment_decays_backward(Tensor dweights, Tensor weights) -> Tensor",
    lambda dweights, weights: weights.new_empty(weights.shape[:-1]),
)
BLOCK, KEPT = 16, 32
"""Channels that the selective scan works on at once, and steps from one state that it keeps to the next."""


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: object
) -> object:
    batch, steps, signals, width = u.shape
    kept = u.new_empty(batch * -(-width // BLOCK), -(-steps // KEPT), A.shape[1] * signals * BLOCK)
    return *_like(u, state), kept


_define(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? reset) "
    "-> (Tensor, Tensor, Tensor)",
    _selective_scan,
)
_define(
    "selective_scan_backward(Tensor dy, Tensor dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor state, Tensor? reset, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dy, dlast, u, delta, A, B, C, *_: _like(u, delta, A, B, C, dlast),
)
_define(
    "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor? mask, Tensor? reset, bool silu) "
    "-> (Tensor, Tensor)",
    lambda x, weight, bias, state, *_: _like(x, state),
)
_define(
    "causal_conv_backward(Tensor dy, Tensor dlast, Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor? mask, "
    "Tensor? reset, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, dlast, x, weight, bias, state, *_: _like(x, weight, bias, state),
)
