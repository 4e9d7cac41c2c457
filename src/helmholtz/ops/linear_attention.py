"""Linear attention with or without decay: unnormalised causal sums over a matrix-valued state."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helmholtz._checks import check
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._linear_chunks import Chunked


def recurrent_linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """`linear_attention` one token after another: the same arguments, results and gradients, for short spans."""
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


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(q, k, v, log_decay, state)
    batch, heads, num_steps, width = q.shape
    if state is None:
        state = v.new_zeros((batch, heads, width, v.shape[3]), dtype=compute)
    if num_steps == 0:
        return v, state.to(compute)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    keep = None if reset is None else (~reset[:, None, :, None]).expand(-1, heads, -1, -1)
    pad = _power_of_two(num_steps % chunk_size or chunk_size) - (num_steps % chunk_size or chunk_size)
    rows = [None if x is None else x.to(compute).flatten(0, 1) for x in (q, k, v, log_decay, keep)]
    if pad:
        rows = [x if x is None else F.pad(x, (0, 0, 0, pad), value=float(x is rows[4])) for x in rows]
    out, last = Chunked.apply(*rows, state.to(compute).flatten(0, 1), chunk_size)
    out = out[:, :num_steps].unflatten(0, (batch, heads)).to(v.dtype)
    return out, last.unflatten(0, (batch, heads))


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
    check(
        chunk_size >= 1 and chunk_size == _power_of_two(chunk_size),
        "chunk_size",
        chunk_size,
        "a power of two",
    )
    return _chunked_linear_attention(q, k, v, log_decay, state, reset, chunk_size)
