"""Linear attention with or without decay: unnormalised causal sums over a matrix-valued state."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz import kernels
from helmholtz._checks import check
from helmholtz.ops import _linear_fla
from helmholtz.ops._chunks import chunked_sums
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._dispatch import Backend, choose


def recurrent_linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """`linear_attention` one token after another: the same results and gradients, for short spans."""
    compute = compute_dtype(q, k, v, log_decay, state)
    if state is None:
        state = v.new_zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=compute)
    state = state.to(compute)
    if v.shape[2] == 0:
        return v, state
    decay = torch.ones_like(k[..., :1], dtype=compute)
    if log_decay is not None:
        decay = log_decay.to(compute).exp()
        decay = decay.unsqueeze(-1) if decay.ndim == 3 else decay
    if reset is not None:
        decay = decay.masked_fill(reset[:, None, :, None], 0)
    out = []
    columns = k.to(compute).unsqueeze(-1), v.to(compute).unsqueeze(-2), decay.unsqueeze(-1)
    for q_t, k_t, v_t, a_t in zip(q.to(compute).unbind(2), *(x.unbind(2) for x in columns), strict=True):
        state = a_t * state + k_t * v_t
        out.append((q_t.unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, dim=2).to(v.dtype), state


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    if v.shape[2] == 1 and not kernels.usable(
        "linear_attention", q, k, v, log_decay, state
    ):  # a step of a stream
        return recurrent_linear_attention(q, k, v, log_decay, state=state, reset=reset)
    compute, dtype = compute_dtype(q, k, v, log_decay, state), v.dtype
    if v.shape[2] == 0:
        state = v.new_zeros((*k.shape[:2], k.shape[3], v.shape[3])) if state is None else state
        return v, state.to(compute)
    decays = _decays(v, log_decay, reset, compute)
    q, k, v = (_readable(x, compute) for x in (q, k, v))
    state = None if state is None else state.to(compute)
    out, last = chunked_sums(q, k, v, decays, state, chunk=chunk_size)
    return out.to(dtype), last


def _decays(v: Tensor, log_decay: Tensor | None, reset: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """``B H T E``; a restart forgets all."""
    decays = None
    if log_decay is not None:
        decays = (log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay).to(compute)
    if reset is None:
        return decays
    decays = v.new_zeros(1, dtype=compute) if decays is None else decays
    return torch.where(reset[:, None, :, None], -torch.inf, decays)


def _readable(x: Tensor, compute: torch.dtype) -> Tensor:
    """As a kernel reads it: bfloat16 is widened there."""
    return x if x.dtype == torch.bfloat16 and compute == torch.float32 else x.to(compute)


_BACKENDS = (
    Backend("fla", _linear_fla.run, _linear_fla.refuses),
    Backend("torch", _torch, lambda *_: None),
)


def linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    r"""Causal sums of the values with weights that are products of queries and keys, not normalised.

    .. math:: S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad o_t = S_t^\top q_t

    To normalise, append a channel of ones to ``v`` and divide by what comes out of it.

    Args:
        log_decay: :math:`g_t \le 0` in nats, down to ``-inf``: None, one per head (simple GLA, SSD) or one per
            key channel (GLA).
        state: :math:`S_{-1}`; zeros by default.
        reset: where True, :math:`S_{t-1}` counts as 0.
        chunk_size: steps per matrix product of the torch path, a power of two; a matter of speed and memory.
        backend: "auto", "torch" or "fla"; a named backend runs or raises with its reason. "fla" takes CUDA
            tensors, float32 only where TF32 products are permitted.

    Returns:
        ``(out, last)``; ``last`` is :math:`S` after the last step in the compute dtype.

    Accuracy:
        Computed in at least float32. Log decays are only added and factors only multiplied: no exponent is above 0,
        nothing is clamped, and the gradient of a decay sums just the pairs that its step separates.

    Cost:
        Time ``O(B H T (C (K + V) + K V))`` with C the chunk size; per-channel decays add ``log2 C`` passes over
        ``k``. Memory ``O(B H T (C + K + V))`` plus one state per chunk.

    Raises:
        ValueError: if ``chunk_size`` is no power of two, or ``backend`` cannot run this call.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, section 3.3; Yang et al., "Gated Linear
    Attention Transformers with Hardware-Efficient Training", 2024, section 4.
    """
    check(chunk_size > 0 and chunk_size.bit_count() == 1, "chunk_size", chunk_size, "a power of two")
    call = (q, k, v, log_decay, state, reset)
    chosen = choose(_BACKENDS, backend, *call)
    return chosen.run(*call, chunk_size=chunk_size) if chosen.name == "torch" else chosen.run(*call)


def linear_average(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V1"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V1"]]:
    """`linear_attention` of the values over that of ones, the last column of the state: averages where weights are
    positive. Where they are all 0 it is 0 with gradient 0.

    Returns: ``(averages, last)`` in the compute dtype.
    Cost: the kernel makes no column of ones and divides in a core's cache.
    """
    compute = compute_dtype(q, k, v, log_decay, state)
    by_head = log_decay is None or log_decay.ndim == 3
    if (
        by_head
        and backend != "fla"
        and v.shape[2]
        and kernels.usable("linear_attention", q, k, v, log_decay, state, reset)
    ):
        if state is None:
            state = v.new_zeros((*k.shape[:2], k.shape[3], v.shape[3] + 1), dtype=compute)
        decays = None if log_decay is None else log_decay.to(compute)
        if reset is not None:
            decays = _decays(v, log_decay, reset, compute)
            decays = None if decays is None else decays.squeeze(-1).expand(v.shape[:3])
        q, k, v = (_readable(x, compute) for x in (q, k, v))
        out, last, _, _ = torch.ops.helmholtz.linear_attention(
            q, k, v, decays, state.to(compute), False, True
        )
        return out, last
    ones = F.pad(v.to(compute), (0, 1), value=1.0)
    sums, last = linear_attention(q, k, ones, log_decay, state=state, reset=reset, backend=backend)
    signals, mass = sums.split([v.shape[3], 1], dim=-1)
    return signals / F.threshold(mass, 0, 1), last
