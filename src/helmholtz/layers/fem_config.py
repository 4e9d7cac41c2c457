"""Configuration of the Free Energy Mixer: its widths, and which options may be combined."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from helmholtz._checks import (
    check,
    check_choice,
    check_divides,
    check_fraction,
    check_integer,
    check_non_negative,
    check_positive,
)

Prior = Literal["softmax", "linear", "gla", "rnn_softmax", "mamba"]
Read = Literal["temperature", "free_energy", "mean"]

PRIORS: tuple[Prior, ...] = ("softmax", "linear", "gla", "rnn_softmax", "mamba")


class Widths(NamedTuple):
    """Head widths of a mixer."""

    d_head: int
    d_head_v: int


def fem_widths(d_model: int, n_heads: int, *, fem_ratio: float = 0.5, qk_ratio: float = 4.0) -> Widths:
    """Head widths for value path ``d = fem_ratio D`` and ``|Q| + |K| = qk_ratio d``, rounded to whole (even) heads.

    The two published sizings hold the 4 D^2 weights of plain attention: (0.5, 4), as in all experiments of the paper,
    and (2/3, 2). With the first, ``K = 2 V``: keys are as wide as the two signals, which one attention call wants.

    Returns: ``d_head`` is even (rotary pairs); both are at least 2 and 1. Half-way cases round up.
    Source: Lu & Yang 2026, parameter budgets. What rounding leaves over, ``matched_d_ff`` gives back.
    """
    if not fem_ratio > 0 or not qk_ratio > 0:
        raise ValueError(f"fem_ratio, qk_ratio: wanted positive ratios, got {fem_ratio} and {qk_ratio}")
    d_head_v = max(1, int(fem_ratio * d_model / n_heads + 0.5))
    d_head = 2 * max(1, int(qk_ratio * d_head_v / 4 + 0.5))
    return Widths(d_head, d_head_v)


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options of a mixer whatever its width and heads; one that only some priors have acts on their layers.

    Without slots: a command line cannot read the defaults of a nested config that has them.
    """

    d_head: int | None = None
    """Key width K per head of softmax, linear and gla; None means D / H (rnn_softmax has V, mamba none)."""
    d_head_v: int | None = None
    """Value width V per head; None means D / 2H, rounded up to pairs where rnn_softmax rotates its keys."""
    read: Read = "temperature"
    """"mean" of the prior, "free_energy" at beta = 1, or "temperature": learned beta_max with the inner gate."""
    outer_gate: bool = True
    """Multiply the read by a positive, per-head normalised gate."""
    tdc_width: int | None = None
    """Width of the time-decay conditioning; None means D / 32, even, at least 8 (it is normalised); 0 means none."""
    tdc_norm_first: bool = True
    """Normalise the input of the conditioning."""
    bias: bool = False
    """Add biases to the projections."""
    cap: float = 40.0
    """Largest ``|beta v|`` in nats that enters the exponential; above 44 gradients can leave float32."""
    eps: float = 1e-6
    """Added to gates and features that must stay positive."""
    theta_init: float = 1.8
    """``beta_max = softplus(theta) + eps`` starts here: 1.8 gives 1.953."""
    decay: Literal["head", "channel"] | None = None
    """For gla: one decay per head (None means this) or per key channel."""
    d_state: int | None = None
    """For mamba: states per channel; None means 16."""
    normalize: bool = True
    """For mamba: divide by the scan on ones. Without it only ``read="mean"`` makes sense."""
    backend: Literal["auto", "torch", "flash_attn", "fla"] = "auto"
    """Kernel: "flash_attn" acts on softmax layers, "fla" on linear and gla layers; they run or raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeEnergyMixerConfig(MixerOptions):
    """Sizes and options of one mixer. Fields left None are filled in; the stored config is complete.

    Raises: ValueError naming the field for a size that does not fit or an option that would have no effect.
    """

    kind: Literal["fem"] = "fem"
    d_model: int
    """Width D of the input and the output."""
    n_heads: int
    """Heads H of the prior."""
    n_kv_heads: int | None = None
    """Key/value heads G of the softmax prior (grouped queries); None means H."""
    prior: Prior = "softmax"
    """Which causal average the read starts from."""
    tdc_bidirectional: bool = False
    """Give half of the conditioning to a pass from the end; needs ``causal=False``."""
    rope_theta: float | None = None
    """Base of the rotary positions; None means 10000, 0 none. Mamba has no queries to rotate."""
    causal: bool = True
    """Let a token see itself and the past only."""
    dropout: float = 0.0
    """Probability of zeroing an element of the mixer's output in training."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("fem",))
        for name in ("d_model", "n_heads"):
            check_integer(name, getattr(self, name))
        check_choice("prior", self.prior, PRIORS)
        check_choice("read", self.read, ("temperature", "free_energy", "mean"))
        self._fill()
        self._check_sizes()
        self._check_numbers()
        self._check_options()

    def _fill(self) -> None:
        widths = fem_widths(self.d_model, self.n_heads)
        self._default("n_kv_heads", self.n_heads)
        odd = widths.d_head_v % 2 if self.prior == "rnn_softmax" and self.rope_theta != 0 else 0
        self._default("d_head_v", widths.d_head_v + odd)
        if self.prior != "mamba":
            self._default("d_head", self.d_head_v if self.prior == "rnn_softmax" else widths.d_head)
        self._default("tdc_width", max(8, 2 * round(self.n_heads * widths.d_head_v / 32)))
        self._default("rope_theta", 0.0 if self.prior == "mamba" else 10000.0)
        if self.prior == "gla":
            self._default("decay", "head")
        if self.prior == "mamba":
            self._default("d_state", 16)

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        for name in ("n_kv_heads", "d_head", "d_head_v", "d_state"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        check_integer("tdc_width", self.tdc_width, minimum=0)
        check_divides("n_kv_heads", self.n_kv_heads or 0, "n_heads", self.n_heads)
        if self.n_kv_heads != self.n_heads:
            check(
                self.prior == "softmax",
                "prior",
                self.prior,
                "'softmax' for grouped key/value heads (n_kv_heads)",
            )
        if self.prior == "rnn_softmax":
            wanted = f"d_head_v = {self.d_head_v} for rnn_softmax (one weight per value channel)"
            check(self.d_head == self.d_head_v, "d_head", self.d_head, wanted)
        if self.rope_theta and self.d_head is not None:
            check(
                self.d_head % 2 == 0, "d_head", self.d_head, "even for rotary positions (or set rope_theta=0)"
            )

    def _check_numbers(self) -> None:
        check_non_negative("rope_theta", self.rope_theta or 0.0)
        check_fraction("dropout", self.dropout)
        check(0 < self.cap <= 80, "cap", self.cap, "in (0, 80] nats: float32 holds exp(80)")
        check_positive("eps", self.eps)

    def _check_options(self) -> None:
        """Refuse every option that would have no effect beside the others."""
        dead = {
            "d_head": (self.d_head is not None and self.prior == "mamba", "mamba has no queries and keys"),
            "rope_theta": (bool(self.rope_theta) and self.prior == "mamba", "mamba has no queries to rotate"),
            "decay": (self.decay is not None and self.prior != "gla", "only prior='gla' decays"),
            "d_state": (self.d_state is not None and self.prior != "mamba", "only prior='mamba' has states"),
            "normalize": (
                not self.normalize and (self.prior != "mamba" or self.read != "mean"),
                "an unnormalised scan is no distribution: it needs prior='mamba' and read='mean'",
            ),
            "cap": (self.cap != 40.0 and self.read == "mean", "the mean needs no exponential"),
            "theta_init": (
                self.theta_init != 1.8 and self.read != "temperature",
                "only read='temperature' learns beta_max",
            ),
            "tdc_bidirectional": (self.tdc_bidirectional and not self.tdc_width, "there is no conditioning"),
            "tdc_norm_first": (not self.tdc_norm_first and not self.tdc_width, "there is no conditioning"),
        }
        for name, (is_dead, reason) in dead.items():
            if is_dead:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, but {reason}")
        if self.tdc_bidirectional and self.causal:
            raise ValueError("tdc_bidirectional: got True, but causal=True forbids reading from the end")
        backends = {"softmax": ("flash_attn",), "linear": ("fla",), "gla": ("fla",)}.get(self.prior, ())
        check_choice("backend", self.backend, ("auto", "torch", *backends))
        if self.prior == "gla":
            check_choice("decay", self.decay, ("head", "channel"))
