"""The seam of the Free Energy Mixer: a prior is a causal average."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.ops._step import takes_steps
from helmholtz.ops.free_energy import tilt_values

Features = Mapping[str, Float[Tensor, "B T W"]]
"""What the mixer projected for its prior, by the names that the prior asked for."""


@dataclass(frozen=True, slots=True)
class Tilt:
    """The signals that a prior averages: made by a call, or by a kernel from ``beta`` and ``cap``."""

    by_kernels: ClassVar[bool] = True
    """Whether a kernel may make them. A subclass of another call says no."""
    beta: Float[Tensor, "G V"] | None
    """Inverse temperature per value head and channel; None where the values alone are averaged."""
    cap: float

    def __call__(
        self, values: Float[Tensor, "B G T V"], *, signals_first: bool = False
    ) -> Float[Tensor, "B G T N V"]:
        if self.beta is None:
            return values.unsqueeze(-2)
        return tilt_values(values, self.beta, cap=self.cap, signals_first=signals_first)


class AbstractPrior(nn.Module, abc.ABC):
    """For each query ``t`` and channel, weights over the visible tokens: non-negative, summing to one.

    Only averages are exposed, never ``T x T`` weights, so a prior of O(T) stays O(T). All signals of a channel are
    averaged with the same weights; the free-energy read sends a value and its exponential through one call.
    """

    query_widths: dict[str, int]
    """Features projected from the queries' side, by name and total width."""
    key_widths: dict[str, int]
    """Features projected from the side that is read, by name and total width."""
    read_names: frozenset[str] = frozenset()
    """Those of ``key_widths`` that read all the same: a token's own, made of ``x`` where there is a source."""

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__()
        self.n_heads, self.causal, self.eps = config.n_heads, config.causal, config.eps

    @abc.abstractmethod
    def forward(
        self,
        features: Features,
        values: Float[Tensor, "B G S V"],
        tilt: Tilt,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        state: Any,
    ) -> tuple[Float[Tensor, "B H T N V"], Any]:
        """``(averages of tilt(values), new state)``, in at least float32.

        ``state=None`` is a whole sequence. A query that sees no token gets 0 with gradient 0.
        ``layout`` places the queries, ``key_layout`` the tokens that are read; they differ in cross-attention only.
        """

    @abc.abstractmethod
    def init_state(self, position: Int[Tensor, "B"]) -> Any:
        """State before the first token, given the stream's position."""

    def output_gate(self, features: Features, layout: SequenceLayout) -> Float[Tensor, "B T H V"] | None:
        """Pre-activations of a factor on the read, after the logarithm; None where the prior has none."""
        return None


def is_step(x: Float[Tensor, "B T C"], tilt: Tilt, layout: SequenceLayout, state: Tensor) -> bool:
    """Whether a kernel of ``ops._step`` takes this call: one real token, signals that the kernel can make itself."""
    return tilt.by_kernels and layout.mask is None and takes_steps(x, state)


def split_heads(x: Float[Tensor, "B T W"], heads: int) -> Float[Tensor, "B H T K"]:
    batch, time, width = x.shape
    return x.view(batch, time, heads, width // heads).transpose(1, 2)
