"""The Free Energy Mixer in the spelling of its original README, translated to ``helmholtz.layers.fem``."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import (
    check,
    check_choice,
    check_divides,
    check_fraction,
    check_integer,
    check_positive,
)
from helmholtz.layers import fem, fem_config

_BACKENDS: dict[str, Literal["auto", "torch", "flash_attn"]] = {
    "auto": "auto",
    "flash": "flash_attn",
    "naive": "torch",
}


@dataclass(slots=True, kw_only=True)
class FreeEnergyMixerConfig:
    """Sizes and options of one mixer, in the original names. Mutable: checked when a layer is built from it.

    An option that would have no effect beside the others must be left at its default.
    """

    n_embd: int
    """Width D of the input and the output."""
    n_head: int
    """Heads; divides ``n_embd``."""
    fem_dim: int | None = None
    """Width of the value path, a multiple of ``n_head``; overrides ``fem_ratio``."""
    fem_ratio: float = 0.5
    """``fem_dim`` relative to ``n_embd``, rounded to whole heads."""
    qk_dim: int | None = None
    """Width of the queries and of the keys, a multiple of ``n_head``; overrides ``p_t_to_fem_ratio``."""
    p_t_to_fem_ratio: float = 4.0
    """Width of queries and keys together relative to ``fem_dim``, rounded to even heads. ``rnn_softmax`` needs 2."""
    prior_type: Literal["softmax", "linear", "gla", "rnn_softmax", "mamba"] = "softmax"
    """Which average the read starts from."""
    softmax_backend: Literal["auto", "flash", "naive"] = "auto"
    """Kernel of the softmax prior: "flash" (flash_attn) runs or raises, "naive" is plain torch, "auto" picks."""
    dropout: float = 0.0
    """Probability of zeroing an element of the output in training."""
    causal: bool = True
    """Let a token see itself and the past only."""
    bias: bool = True
    """Add biases to the projections."""
    use_temperature: bool = True
    """Read with a learned inverse temperature per channel and an inner gate."""
    use_lse: bool = True
    """Without ``use_temperature``: read the log-sum-exp at beta = 1; both off: the mean."""
    use_outer_gate: bool = True
    """Multiply the read by a positive gate."""
    value_logexp_cap: float = 40.0
    """Largest ``|beta v|`` in nats that enters the exponential, at most 80."""
    eps: float = 1e-6
    """Added to gates and features that must stay positive."""
    use_rope: bool = True
    """Rotate queries and keys by position; mamba has none."""
    rope_theta: float = 10000.0
    """Base of the rotary positions."""
    use_conv: bool = True
    """Time-decay conditioning of everything that is projected."""
    conv_hidden: int = 64
    """Width of the conditioning."""
    conv_norm_first: bool = True
    """Normalise the input of the conditioning."""
    conv_bidirectional: bool = False
    """Give half of the conditioning to a pass from the end; needs ``causal=False``."""
    ssm_rank: int = 16
    """States per channel of mamba."""
    mamba_normalize: bool = True
    """Divide the scan of mamba by the scan on ones. Without it only the mean can be read."""

    def to_core(self) -> fem_config.FreeEnergyMixerConfig:
        """The same mixer in the library's own names.

        Warns: for ``rnn_softmax`` with ``p_t_to_fem_ratio`` other than 2, which is then taken as 2.
        Raises: ValueError naming the argument for a wrong value or an option that contradicts the others.
        """
        return _translate(self)


class FreeEnergyMixer(nn.Module):
    """``helmholtz.layers.fem.FreeEnergyMixer`` built from the original config; the layer itself is ``mixer``.

    Raises: ValueError naming the argument, here and in a call once ``config`` was changed behind the layer's back.
    """

    def __init__(self, config: FreeEnergyMixerConfig) -> None:
        super().__init__()
        check(isinstance(config, FreeEnergyMixerConfig), "config", config, f"a {__name__} config")
        self.mixer = fem.FreeEnergyMixer(_translate(config))
        self.config, self._built_from = config, replace(config)

    def forward(
        self, x: Float[Tensor, "B T D"], attention_mask: Shaped[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Mix a whole sequence; ``attention_mask`` is bool or integer, non-zero where a token is real."""
        self._check_unchanged()
        return self.mixer(x, attention_mask=attention_mask)

    def init_state(self, batch_size: int) -> fem.MixerState:
        """The state before the first token."""
        return self.mixer.init_state(batch_size)

    def step(
        self,
        x: Float[Tensor, "B T D"],
        state: fem.MixerState,
        attention_mask: Shaped[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], fem.MixerState]:
        """Mix one or many further tokens; any split of a sequence into steps equals ``forward``."""
        self._check_unchanged()
        return self.mixer.step(x, state, attention_mask=attention_mask)

    def _check_unchanged(self) -> None:
        if self.config == self._built_from:
            return
        for field in fields(self.config):
            built, now = getattr(self._built_from, field.name), getattr(self.config, field.name)
            if now != built:
                raise ValueError(
                    f"{field.name}: got {now!r} after the layer was built with {built!r}; a layer reads its config "
                    "once: build a new one (and give each its own: dataclasses.replace(config, ...))"
                )


def _translate(c: FreeEnergyMixerConfig) -> fem_config.FreeEnergyMixerConfig:
    _check_values(c)
    read = _read(c)
    _check_used(c, read)
    _check_combinations(c, read)
    is_mamba = c.prior_type == "mamba"
    d_head, d_head_v = _head_widths(c)
    return fem_config.FreeEnergyMixerConfig(
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=None if is_mamba else d_head,
        d_head_v=d_head_v,
        prior=c.prior_type,
        read=read,
        outer_gate=c.use_outer_gate,
        tdc_width=c.conv_hidden if c.use_conv else 0,
        tdc_bidirectional=c.conv_bidirectional,
        tdc_norm_first=c.conv_norm_first,
        rope_theta=c.rope_theta if c.use_rope else 0.0,
        causal=c.causal,
        bias=c.bias,
        dropout=c.dropout,
        cap=c.value_logexp_cap,
        eps=c.eps,
        d_state=c.ssm_rank if is_mamba else None,
        normalize=c.mamba_normalize,
        backend=_BACKENDS[c.softmax_backend],
    )


def _read(c: FreeEnergyMixerConfig) -> fem_config.Read:
    if c.use_temperature and not c.use_lse:
        raise ValueError(
            "use_lse: got False, but use_temperature=True learns the temperature of that very branch; "
            "set use_temperature=False as well to read the mean"
        )
    return "temperature" if c.use_temperature else "free_energy" if c.use_lse else "mean"


def _check_values(c: FreeEnergyMixerConfig) -> None:
    """Each value on its own, by the type of its field."""
    for field in fields(c):
        name, value = field.name, getattr(c, field.name)
        if field.type is bool:
            check(isinstance(value, bool), name, value, "True or False")
        elif field.type is float:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            check(is_number, name, value, "a number")
            check_fraction(name, value) if name == "dropout" else check_positive(name, value)
        elif field.type is int or value is not None and field.type == int | None:
            check_integer(name, value)
    check_choice("prior_type", c.prior_type, fem_config.PRIORS)
    check_choice("softmax_backend", c.softmax_backend, tuple(_BACKENDS))
    check(
        c.value_logexp_cap <= 80, "value_logexp_cap", c.value_logexp_cap, "at most 80 (float32 holds exp(80))"
    )
    check_divides("n_head", c.n_head, "n_embd", c.n_embd)


def _check_used(c: FreeEnergyMixerConfig, read: fem_config.Read) -> None:
    """Nothing was set that the other options leave without effect."""
    conv = (c.use_conv, "use_conv=False")
    attends = (c.prior_type != "mamba", "prior_type='mamba' has no queries and keys")
    scans = (c.prior_type == "mamba", f"prior_type={c.prior_type!r} is no state-space model")
    adds = c.use_outer_gate or read == "temperature" or c.prior_type != "softmax"
    used = {
        "qk_dim": attends,
        "p_t_to_fem_ratio": attends,
        "softmax_backend": (c.prior_type == "softmax", f"prior_type={c.prior_type!r}"),
        "value_logexp_cap": (read != "mean", "use_temperature and use_lse are off: nothing is exponentiated"),
        "eps": (adds, "no gate, temperature or feature map is there to add it to"),
        "rope_theta": (c.use_rope, "use_rope=False"),
        "conv_hidden": conv,
        "conv_norm_first": conv,
        "conv_bidirectional": conv,
        "ssm_rank": scans,
        "mamba_normalize": scans,
    }
    for field in fields(c):
        is_used, reason = used.get(field.name, (True, ""))
        value = getattr(c, field.name)
        if not is_used and value != field.default:
            raise ValueError(f"{field.name}: got {value!r}, but it would have no effect: {reason}")


def _check_combinations(c: FreeEnergyMixerConfig, read: fem_config.Read) -> None:
    contradictions = {
        "use_rope": (
            c.use_rope and c.prior_type == "mamba",
            "prior_type='mamba' has no queries and keys to rotate",
        ),
        "conv_bidirectional": (c.conv_bidirectional and c.causal, "causal=True forbids reading from the end"),
        "conv_hidden": (
            c.conv_bidirectional and c.conv_hidden % 2,
            "conv_bidirectional=True splits it in two",
        ),
        "mamba_normalize": (
            not c.mamba_normalize and read != "mean",
            "a free energy needs a distribution: set use_temperature=False and use_lse=False",
        ),
        "softmax_backend": (
            c.softmax_backend == "flash" and read != "mean",
            "flash_attn has no float32, which the free-energy branch needs: "
            "set use_temperature=False and use_lse=False",
        ),
    }
    for name, (is_contradiction, reason) in contradictions.items():
        if is_contradiction:
            raise ValueError(f"{name}: got {getattr(c, name)!r}, but {reason}")


def _head_widths(c: FreeEnergyMixerConfig) -> fem_config.Widths:
    """Widths per head of queries and keys, and of values."""
    d_head_v = _per_head(c, "fem_dim")
    if d_head_v is None:
        d_head_v = fem_config.fem_widths(c.n_embd, c.n_head, fem_ratio=c.fem_ratio).d_head_v
    d_head = _per_head(c, "qk_dim")
    if d_head is None:
        width = c.n_head * d_head_v
        d_head = fem_config.fem_widths(width, c.n_head, fem_ratio=1.0, qk_ratio=c.p_t_to_fem_ratio).d_head
    if c.prior_type == "rnn_softmax":
        d_head = _rnn_width(c, d_head, d_head_v)
    if c.use_rope and d_head % 2:
        name = "fem_dim" if c.prior_type == "rnn_softmax" else "qk_dim"
        raise ValueError(f"{name}: got {d_head} channels per head, but use_rope=True rotates pairs of them")
    if c.softmax_backend == "flash" and d_head != d_head_v:
        raise ValueError(
            "softmax_backend: got 'flash', but flash_attn needs queries, keys and values of one width: "
            f"set qk_dim = fem_dim, got {c.n_head * d_head} and {c.n_head * d_head_v}"
        )
    return fem_config.Widths(d_head, d_head_v)


def _per_head(c: FreeEnergyMixerConfig, name: Literal["fem_dim", "qk_dim"]) -> int | None:
    width: int | None = getattr(c, name)
    if width is None:
        return None
    check_divides("n_head", c.n_head, name, width)
    return width // c.n_head


def _rnn_width(c: FreeEnergyMixerConfig, d_head: int, d_head_v: int) -> int:
    """AFT has one weight per value channel: its queries and keys are as wide as the values."""
    if c.qk_dim is not None:
        wanted = (
            f"fem_dim = {c.n_head * d_head_v} for prior_type='rnn_softmax' (one weight per value channel)"
        )
        check(d_head == d_head_v, "qk_dim", c.qk_dim, wanted)
    elif c.p_t_to_fem_ratio != 2:
        warnings.warn(
            f"p_t_to_fem_ratio: got {c.p_t_to_fem_ratio}, taken as 2.0: rnn_softmax has one weight per value channel",
            stacklevel=5,
        )
    return d_head_v
