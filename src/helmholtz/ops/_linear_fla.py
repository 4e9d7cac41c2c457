"""Linear attention by the chunk kernels of ``fla`` (flash-linear-attention >= 0.6), on CUDA tensors."""

import importlib
import importlib.util

import torch
from torch import Tensor

from helmholtz._once import mark_as_once


def refuses(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, reset: Tensor | None
) -> str | None:
    """Why the kernels cannot take this call, or None."""
    given = [x for x in (q, k, v, log_decay, state, reset) if x is not None]
    devices = sorted({x.device.type for x in given})
    if devices != ["cuda"]:
        return f"it needs CUDA tensors, these are on {', '.join(devices)}"
    if not q.dtype == k.dtype == v.dtype or q.dtype == torch.float64:
        return f"it takes q, k and v of one dtype up to float32; these are {q.dtype}, {k.dtype}, {v.dtype}"
    if q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "it multiplies float32 in TF32; torch.set_float32_matmul_precision('high') permits that"
    if v.shape[2] == 0:
        return "it takes no empty sequence"
    if importlib.util.find_spec("fla") is None:
        return "the package fla is not installed: pip install flash-linear-attention"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(out, last state)``. Its layout is ``B T H K``; packed rows go in as one row with ``cu_seqlens``."""
    batch, heads, num_steps, width = q.shape
    if state is None:
        state = v.new_zeros((batch, heads, width, v.shape[3]), dtype=torch.float32)
    state = state.float()
    rows = [None if x is None else x.transpose(1, 2) for x in (q, k, v, log_decay)]
    first = torch.arange(batch, device=q.device)
    bounds = None
    if reset is not None:
        starts = reset.clone()
        starts[:, 0] = True
        flat = starts.flatten().nonzero().squeeze(1)
        bounds = torch.cat([flat, flat.new_tensor([batch * num_steps])])
        first = torch.searchsorted(flat, first * num_steps)
        kept = state.masked_fill(reset[:, 0].view(-1, 1, 1, 1), 0)
        state = state.new_zeros((len(flat), *state.shape[1:])).index_copy(0, first, kept)
        rows = [None if x is None else x.flatten(0, 1).unsqueeze(0) for x in rows]
    last = torch.cat([first[1:] - 1, first.new_tensor([len(state) - 1])])
    per_channel = log_decay is not None and log_decay.ndim == 4
    module, name = ("fla.ops.gla", "chunk_gla") if per_channel else ("fla.ops.simple_gla", "chunk_simple_gla")
    kernel = getattr(importlib.import_module(module), name)
    wide = None if rows[3] is None else rows[3].float()
    out, final = kernel(
        *rows[:3], g=wide, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=bounds
    )
    mark_as_once("fla", out, final)
    return out.reshape(batch, num_steps, heads, -1).transpose(1, 2), final[last]
