"""A selective state-space model with positive weights as a prior."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.priors.base import AbstractPrior, Features, Tilt, is_step
from helmholtz.layers.sequence import SequenceLayout, reversed_reset
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops._step import selective_step
from helmholtz.ops.selective_scan import selective_average, selective_scan


class MambaPrior(AbstractPrior):
    r"""Weights of the scan :math:`h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t,\ y_t = C_t \cdot h_t + D u_t`.

    :math:`A < 0`, :math:`\Delta, B, C, D > 0`, so every weight is positive, and dividing by the same scan on ones
    (skip term included) makes them a distribution: a logarithm of a scan with signed weights would have no meaning.

    Without ``normalize`` there is no division by the scan on ones, so no distribution, hence no free energy.

    Source: Gu & Dao, "Mamba", 2023; made positive after Lu & Yang 2026. ``Delta = exp(-softplus(W x))`` lies in (0, 1).
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__(config)
        c = config
        assert c.d_state is not None and c.d_head_v is not None
        width = c.n_heads * c.d_head_v
        self.d_state, self.normalize = c.d_state, c.normalize
        self.query_widths = {}
        self.key_widths = {"delta": width, "b": c.d_state, "c": c.d_state}
        # its rows lie among the keys', and old checkpoints have them there
        self.read_names = frozenset({"c"})
        self.A_raw = nn.Parameter(torch.full((width, c.d_state), -1.0))
        self.D_raw = nn.Parameter(torch.ones(width))

    def forward(
        self,
        features: Features,
        values: Float[Tensor, "B G S V"],
        tilt: Tilt,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: Float[Tensor, "B N1 C R"] | None,
    ) -> tuple[Float[Tensor, "B H T N V"], Float[Tensor, "B N1 C R"]]:
        if state is not None and self.normalize and is_step(features["delta"], tilt, layout, state):
            return selective_step(
                values,
                features["delta"],
                features["b"],
                features["c"],
                self.A_raw,
                self.D_raw,
                tilt.beta,
                state,
                eps=self.eps,
                cap=tilt.cap,
            )
        wide = compute_dtype(values)
        u = tilt(values).permute(0, 2, 3, 1, 4)
        delta = torch.sigmoid(-features["delta"].to(wide))
        if layout.mask is not None:
            delta = delta * layout.mask.unsqueeze(-1)
        b, c = (F.softplus(features[name].to(wide)) + self.eps for name in ("b", "c"))
        rates = -F.softplus(self.A_raw.to(wide)), F.softplus(self.D_raw.to(wide))
        with torch.autocast(values.device.type, enabled=False):
            if self.normalize and self.causal:
                averages, last = selective_average(
                    u, delta, rates[0], b, c, rates[1], state=state, reset=layout.reset
                )
            else:
                y, last = self._scan(u.flatten(3).to(wide), delta, b, c, *rates, layout, state)
                averages = y.unflatten(-1, (self.n_heads, -1))
        return averages.permute(0, 3, 1, 2, 4), last

    def _scan(
        self,
        u: Tensor,
        delta: Tensor,
        b: Tensor,
        c: Tensor,
        rate: Tensor,
        skip: Tensor,
        layout: SequenceLayout,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Without causality or the division."""
        if self.normalize:
            u = torch.cat([u, torch.ones_like(u[:, :, :1])], dim=2)
        ahead, last = selective_scan(u, delta, rate, b, c, skip, state=state, reset=layout.reset)
        if self.causal:
            return ahead, last
        reset = reversed_reset(layout.reset)
        back, _ = selective_scan(u.flip(1), delta.flip(1), rate, b.flip(1), c.flip(1), reset=reset)
        y = ahead + back.flip(1) - (delta * (b * c).sum(-1, keepdim=True)).unsqueeze(2) * u
        return (y[:, :, :-1] / y[:, :, -1:] if self.normalize else y), last

    def init_state(self, position: Int[Tensor, "B"]) -> None:
        return None
