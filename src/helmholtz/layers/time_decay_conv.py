"""Time-decay conditioning (TDC): a narrow recurrence over the input that scales what a mixer projects."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz.layers.sequence import SequenceLayout, reversed_reset
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.gated_read import gated
from helmholtz.ops.scan import leaky_scan


class TimeDecayConditioning(nn.Module):
    r"""Local features of the recent past, from which a mixer scales its pre-activations by ``1 + out_proj(features)``.

    .. math:: z = \mathrm{LN}(x), \quad a_t = e^{-\mathrm{softplus}(W_a z_t)}, \quad h_t = a_t h_{t-1} + W_u z_t, \quad
              f_t = \mathrm{RMSNorm}(\mathrm{softplus}(W_s z_t)) \cdot \mathrm{LN}(h_t)

    ``out_proj`` starts at 0, so a new mixer starts unconditioned. The bidirectional form gives half of the width to
    the same recurrence run from the end of each sequence to its start.

    Args:
        width: width of ``h``; the published code of the paper calls it ``conv_hidden``.
        out_features: width of what is scaled.
        norm_first: normalise the input; without it ``z = x``.

    Cost: O(T width) time; a streaming state of ``width`` numbers per row.
    Source: Lu & Yang 2026, local conditioning.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        out_features: int,
        *,
        bidirectional: bool = False,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise ValueError(f"tdc_width: the bidirectional form splits it in two, got {width}")
        self.width, self.bidirectional = width, bidirectional
        self.norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        self.in_proj = nn.Linear(d_model, 3 * width)
        self.state_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, out_features, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], layout: SequenceLayout, state: Float[Tensor, "B W"] | None = None
    ) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B W"]]:
        """``(features, state)``; a pad leaves the state as it was."""
        rate, drive, gate = self.in_proj(self.norm(_wide(x))).chunk(3, dim=-1)
        h, state = self._scan(rate, drive, layout, state)
        return gated(self.state_norm(_wide(h)), gate), state

    def _scan(
        self, rate: Tensor, drive: Tensor, layout: SequenceLayout, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mask, reset = layout.mask, layout.reset
        if not self.bidirectional:
            return leaky_scan(rate, drive, state=state, mask=mask, reset=reset)
        (rate, turned_rate), (drive, turned) = (x.chunk(2, dim=-1) for x in (rate, drive))
        ahead, last = leaky_scan(rate, drive, mask=mask, reset=reset)
        mask = None if mask is None else mask.flip(1)
        back, first = leaky_scan(turned_rate.flip(1), turned.flip(1), mask=mask, reset=reversed_reset(reset))
        return torch.cat([ahead, back.flip(1)], dim=-1), torch.cat([last, first], dim=-1)


def _wide(x: Tensor) -> Tensor:
    """What a norm takes under autocast: on a CPU torch sums the gradients of its weight in the dtype of its input."""
    return x.to(compute_dtype(x)) if torch.is_autocast_enabled(x.device.type) else x
