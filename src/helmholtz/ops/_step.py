"""A step of a stream: what a prior averages for one token, in one call. Nothing of it is recorded for a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz import kernels
from helmholtz.ops._compute import as_dtype, compute_dtype
from helmholtz.ops.rnn_softmax import RNNSoftmaxState


def takes_steps(x: Float[Tensor, "B T C"], state: Tensor) -> bool:
    """Whether the calls below take this token: there are kernels, and nobody wants a gradient.

    The calls of a whole sequence give the same to rounding, but for one token each of them is longer than its work.
    """
    return (
        x.shape[1] == 1
        and not torch.is_grad_enabled()
        and x.dtype in kernels.STORED
        and state.dtype == compute_dtype(x)
        and kernels.usable("linear_step", x, state)
    )


def linear_step(
    q: Float[Tensor, "B 1 HK"],
    k: Float[Tensor, "B 1 HK"],
    v: Float[Tensor, "B H 1 V"],
    decay: Float[Tensor, "B 1 E"] | None,
    beta: Float[Tensor, "H V"] | None,
    rotation: tuple[Tensor, Tensor] | tuple[None, None],
    state: Float[Tensor, "B H K C"],
    *,
    eps: float,
    cap: float,
    temperature: float,
) -> tuple[Float[Tensor, "B H 1 N V"], Float[Tensor, "B H K C"]]:
    """`linear_average` of `tilt_values` at one token.

    Args:
        q, k: before they are turned by a ``rope_table`` and go through the feature map ``relu + eps``.
        decay: pre-activations of log decays, ``logsigmoid(decay) / temperature``, per head or per key channel.
        beta: None averages the values alone.
    """
    mixed, last = torch.ops.helmholtz.linear_step(
        q, k, v, decay, as_dtype(beta, state.dtype), *rotation, state, eps, cap, temperature
    )
    return mixed, last


def rnn_softmax_step(
    k: Float[Tensor, "B 1 C"],
    v: Float[Tensor, "B H 1 V"],
    beta: Float[Tensor, "H V"] | None,
    rotation: tuple[Tensor, Tensor] | tuple[None, None],
    state: RNNSoftmaxState,
    *,
    cap: float,
) -> tuple[Float[Tensor, "B H 1 N V"], RNNSoftmaxState]:
    """`rnn_softmax` of `tilt_values` at one token; ``k`` before it is turned."""
    call = torch.ops.helmholtz.rnn_softmax_step
    mixed, top, sums = call(k, v, as_dtype(beta, state.sums.dtype), *rotation, state.max, state.sums, cap)
    return mixed, RNNSoftmaxState(top, sums)


def selective_step(
    v: Float[Tensor, "B H 1 V"],
    delta: Float[Tensor, "B 1 C"],
    B: Float[Tensor, "B 1 R"],
    C: Float[Tensor, "B 1 R"],
    A: Float[Tensor, "C R"],
    D: Float[Tensor, "C"],
    beta: Float[Tensor, "H V"] | None,
    state: Float[Tensor, "B S1 C R"],
    *,
    eps: float,
    cap: float,
) -> tuple[Float[Tensor, "B H 1 N V"], Float[Tensor, "B S1 C R"]]:
    """`selective_average` of `tilt_values` at one token.

    Args:
        delta, B, C, A, D: pre-activations: of the sigmoid of ``-delta``, else of a softplus; ``eps`` is added to those
            of ``B`` and ``C``, and the rates are ``-softplus(A)``.
    """
    call, wide = torch.ops.helmholtz.selective_step, state.dtype
    mixed, last = call(
        v, delta, B, C, as_dtype(A, wide), as_dtype(D, wide), as_dtype(beta, wide), state, eps, cap
    )
    return mixed, last


def rope_step(
    features: list[Float[Tensor, "B 1 _"]], cos: Float[Tensor, "*B 1 K"], sin: Float[Tensor, "*B 1 K"]
) -> list[Float[Tensor, "B _ 1 K"]]:
    """`rotate` of the heads of each."""
    turned: list[Tensor] = torch.ops.helmholtz.rope_step(features, cos, sin)
    return turned
