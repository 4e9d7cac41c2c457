"""A drop-in for ``torch.nn.MultiheadAttention`` that starts as it and learns to read free energies."""

from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check_divides, check_fraction, check_integer
from helmholtz.layers.free_energy_gate import FreeEnergyGate

AttentionT = TypeVar("AttentionT", bound="FreeEnergyAttention")


class FreeEnergyAttention(nn.Module):
    r"""Multi-head attention whose heads read between the mean and the maximum of their values, per channel.

    The parameters of ``torch.nn.MultiheadAttention`` have its names and shapes; ``free_energy``
    (:class:`~helmholtz.layers.FreeEnergyGate`) is what is new, and changes nothing at the start. So a state dict of
    ``MultiheadAttention`` loads with ``strict=False`` and exactly ``free_energy.*`` missing, and with
    ``from_multihead_attention`` in one call.

    Args:
        dropout: probability to drop an attention weight, in the mean alone: a prior that has lost keys is no
            distribution.
        kdim, vdim: widths of ``key`` and ``value``; None means ``embed_dim``.
        batch_first: ``B T D`` in and out, in place of ``T B D``.
        gates, beta, cap: as in ``FreeEnergyGate``.

    Raises: ValueError for ``add_bias_kv`` and ``add_zero_attn``, whose keys are no token's, and for sizes that do not
        fit.
    Source: Vaswani et al. 2017, section 3.2; Lu & Yang, "Free Energy Mixer", ICLR 2026.
    """

    _qkv_same_embed_dim = False
    """What ``nn.TransformerEncoderLayer`` asks before it goes past this module to a fused kernel: it must not."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gates: Literal["channel", "head"] = "channel",
        beta: float = 1.0,
        cap: float = 40.0,
    ) -> None:
        super().__init__()
        check_integer("embed_dim", embed_dim)
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        check_fraction("dropout", dropout)
        for name, wanted in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if wanted:
                raise ValueError(f"{name} must be False (its extra key is no token's), got True")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.batch_first, self.head_dim = batch_first, embed_dim // num_heads
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **where))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **where))
            self.k_proj_weight = nn.Parameter(torch.empty(embed_dim, self.kdim, **where))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, self.vdim, **where))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **where)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **where)
        self.free_energy = FreeEnergyGate(
            embed_dim, num_heads, self.head_dim, gates=gates, beta=beta, cap=cap, **where
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``MultiheadAttention`` starts: Xavier for the projections, zeros for the biases."""
        for weight in self._in_weights():
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_multihead_attention(
        cls: type[AttentionT],
        attention: nn.MultiheadAttention,
        *,
        gates: Literal["channel", "head"] = "channel",
        beta: float = 1.0,
        cap: float = 40.0,
    ) -> AttentionT:
        """An equal layer with the weights (copied), device, dtype and mode of ``attention``."""
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.bias_k is not None,
            attention.add_zero_attn,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
            attention.out_proj.weight.device,
            attention.out_proj.weight.dtype,
            gates=gates,
            beta=beta,
            cap=cap,
        )
        added = {f"free_energy.{name}": value for name, value in new.free_energy.state_dict().items()}
        new.load_state_dict(attention.state_dict() | added)
        return new.train(attention.training)

    def forward(
        self,
        query: Float[Tensor, "... D"],
        key: Float[Tensor, "... _"],
        value: Float[Tensor, "... _"],
        key_padding_mask: Shaped[Tensor, "B S"] | None = None,
        need_weights: bool = True,
        attn_mask: Shaped[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "... D"], Float[Tensor, "B *heads T S"] | None]:
        """``(output, weights)``, as ``MultiheadAttention`` takes its arguments and gives its results.

        A query that sees no key reads 0 before the output projection, where ``MultiheadAttention`` gives NaN.

        Args:
            key_padding_mask: bool, True where a key is a pad; or float, added to the scores.
            attn_mask: ``T S`` or ``B*H T S``; bool, True where a key must not be seen, or float, added.
            need_weights: return the attention weights, which then are computed one by one (slower).
            is_causal: a promise that ``attn_mask`` is the causal one, which then may be left to the kernel.

        Raises: ValueError for inputs that are not batched or nested, or for ``is_causal`` without ``attn_mask``.
        """
        self._check_inputs(query, key, value, attn_mask, is_causal)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._merge(attn_mask, key_padding_mask, q)
        causal = is_causal and key_padding_mask is None and not need_weights and q.shape[2] == k.shape[2]
        mask, dropout = None if causal else mask, self.dropout if self.training else 0.0
        if need_weights:
            weights = _weights(q, k, mask)
            mean = F.dropout(weights, dropout) @ v
        else:
            mean = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        read = self.free_energy(mean.transpose(1, 2), query, q, k, v, mask=mask, causal=causal)
        out = self.out_proj(read.flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _in_weights(self) -> tuple[Tensor, ...]:
        """One packed weight, or three."""
        if self.kdim == self.vdim == self.embed_dim:
            return (self.in_proj_weight,)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        weights = self._in_weights()
        weights = weights[0].chunk(3) if len(weights) == 1 else weights
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts]

    def _merge(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that broadcasts to ``B H T S``: bool and True where a key is seen, or added to scores."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], -1))
        masks = [attn_mask, None if padding is None else padding[:, None, None]]
        given = [mask for mask in masks if mask is not None]
        if all(mask.dtype == torch.bool for mask in given):
            given = [~mask for mask in given]
            return given[0] & given[-1] if given else None
        added = [_additive(mask, q) for mask in given]
        return added[0] if len(added) == 1 else added[0] + added[1]

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.is_nested or x.ndim != 3 or x.shape[-1] != width:
                got = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
                raise ValueError(f"{name}: wanted three dimensions, the last of {width}, got {got}")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: wanted the causal attn_mask beside it, got None")


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax weights; a query that sees no key has none."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
