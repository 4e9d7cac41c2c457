"""How one head reads a text at a temperature that the reader sets: a table, and a widget with sliders around it."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check, check_choice
from helmholtz._notebook.html import (
    BETA,
    CSS,
    LAMBDA,
    NOTHING,
    cells,
    head_cells,
    heat,
    note,
    number,
    table,
    token_heads,
)
from helmholtz.layers.fem_reading import Reading
from helmholtz.ops.free_energy import hidden_temperature, posterior

Knob = Literal["as trained", "inner gate", "beta"]
KNOBS: tuple[Knob, ...] = get_args(Knob)
LARGEST_BETA = 20.0
MOST_TOKENS = 64
"""Of a text that is taken apart: a reading takes the square of its length times the width in float64."""
MOST_CHANNELS = 8
"""Rows of the widget."""
MOST_WEIGHTS = 1 << 15
"""Numbers of the prior that the widget carries, 11 bytes each."""
NUMBERS = (f"{BETA}*", "mean", "free energy", "KL, nats", "tokens read", f"gate {LAMBDA}")


@dataclass(frozen=True, slots=True)
class QueryRead:
    """What one head reads at one token, per channel, at the temperature that was set."""

    prior: Float[Tensor, "V S"]
    posterior: Float[Tensor, "V S"]
    gate: Float[Tensor, "V"]
    """Inner gate lambda; NaN where beta was set itself."""
    beta: Float[Tensor, "V"]
    """Temperature of the posterior: the hidden one, ``beta*``; NaN where the values do not vary."""
    mean: Float[Tensor, "V"]
    free: Float[Tensor, "V"]
    """Free energy at ``beta``: the gated read."""
    kl: Float[Tensor, "V"]
    """``KL(prior || posterior)`` in nats: ``free = mean + kl / beta``."""

    @property
    def num_tokens_read(self) -> Float[Tensor, "V"]:
        return torch.special.entr(self.posterior).sum(-1).exp()


def read_at(
    reading: Reading, head: int, query: int, knob: Knob = "as trained", value: float = 0.0, *, row: int = 0
) -> QueryRead:
    """The read of token ``query`` of text ``row`` by ``head``.

    Args:
        knob: "as trained": each channel has its own gate; "inner gate": ``value`` in [0, 1] is that of all channels;
            "beta": ``value`` is the temperature of all channels.

    Raises: ValueError for a head, token or value that is not there.
    """
    n_heads, n_tokens = reading.prior.shape[1:3]
    check_choice("knob", knob, KNOBS)
    check(0 <= head < n_heads, "head", head, f"in [0, {n_heads})")
    check(0 <= query < n_tokens, "query", query, f"in [0, {n_tokens}), the text's tokens")
    prior, values = reading.prior[row, head, query].T, reading.values[row, head].T
    gate, beta_max = reading.inner[row, head, query], reading.beta_max[head]
    if knob == "inner gate":
        check(0 <= value <= 1, "inner gate", value, "in [0, 1]")
        gate = torch.full_like(gate, value)
    elif knob == "beta":
        check(0 <= value <= LARGEST_BETA, "beta", value, f"in [0, {LARGEST_BETA:g}]")
        gate, beta_max = torch.ones_like(gate), torch.full_like(beta_max, value)
    found = hidden_temperature(gate, prior, values, beta_max)
    return QueryRead(
        prior=prior,
        posterior=posterior(prior, values, found.beta.nan_to_num()),
        gate=torch.full_like(gate, torch.nan) if knob == "beta" else gate,
        beta=found.beta,
        mean=(prior * values).sum(-1),
        free=found.value,
        kl=found.kl,
    )


def channels_shown(reading: Reading, head: int, query: int, n_channels: int, *, row: int = 0) -> list[int]:
    """The channels whose read is furthest from the prior's at ``beta_max``: the same wherever the slider is."""
    gap = reading.kl[row, head, query]
    return sorted(gap.argsort(descending=True)[:n_channels].tolist())


def labels(reading: Reading) -> tuple[str, ...]:
    """Of the tokens: what they spell if the reading knows it, else their places."""
    return reading.words or tuple(map(str, range(reading.prior.shape[2])))


def has_one_prior(reading: Reading) -> bool:
    """Whether all channels of a head have the same prior."""
    return bool((reading.prior - reading.prior[..., :1]).abs().max() < 1e-6)


def reading_table(reading: Reading, read: QueryRead, query: int, channels: Sequence[int]) -> str:
    """A row of weights per channel under attention's single row, with the numbers of each."""
    shown = slice(0, query + 1 if reading.causal else None)  # what comes later is not read
    columns = [head_cells("channel"), *token_heads(labels(reading)[shown], here=query), head_cells(*NUMBERS)]
    rows = [_prior_row(read, _first_label(reading), shown)]
    rows += [_channel_row(read, channel, shown) for channel in channels]
    return table(columns, rows)


def _first_label(reading: Reading) -> str:
    if not has_one_prior(reading):
        return "prior (mean)"
    return "attention" if reading.kind in ("softmax", "attention") else "prior"


def _prior_row(read: QueryRead, label: str, shown: slice) -> str:
    prior = read.prior.mean(0)
    count = torch.special.entr(prior).sum().exp().item()
    numbers = number(0.0) + cells(NOTHING, NOTHING) + number(0.0) + number(count, 1) + cells(NOTHING)
    weights = "".join(map(heat, prior[shown].tolist()))
    return f'<tr class="hz-first"><td>{label}</td>{weights}{numbers}</tr>'


def _channel_row(read: QueryRead, channel: int, shown: slice) -> str:
    columns = (read.beta, read.mean, read.free, read.kl)
    numbers = "".join(number(column[channel].item()) for column in columns)
    numbers += number(read.num_tokens_read[channel].item(), 1) + number(read.gate[channel].item())
    weights = "".join(map(heat, read.posterior[channel, shown].tolist()))
    return f"<tr><td>{channel}</td>{weights}{numbers}</tr>"


def legend(reading: Reading) -> str:
    """What rows and cells are."""
    if reading.kind == "attention":
        first, rest = (
            "what this attention reads, the same weights in every channel",
            "what a free-energy read of the same keys and values would weight at the temperature that is set; as "
            "trained, every channel reads the first row",
        )
    else:
        single = (
            "the row that attention with these keys would read, in every channel"
            if reading.kind == "softmax"
            else "the prior, which every channel would read without a temperature"
        )
        first = single if has_one_prior(reading) else "the mean of the channels' priors"
        rest = "what each channel reads"
    return (
        f"Cells are percentages of weight. The first row is {first}. Below it is {rest}: weights proportional to "
        f"prior times exp({BETA}* value)."
    )


def reading_html(reading: Reading, *, row: int = 0) -> str:
    """A widget that needs nothing but itself: the table at the most selective head, and sliders for head, token, inner
    gate and beta. Without JavaScript the table alone is there, as trained."""
    n_tokens = min(MOST_TOKENS, reading.prior.shape[2])
    reading = _first_tokens(reading, n_tokens)
    head, query = int(reading.kl[row].mean(dim=(1, 2)).argmax()), n_tokens - 1
    channels = _channels_of_heads(reading, row)
    static = reading_table(reading, read_at(reading, head, query, row=row), query, channels[head])
    data = json.dumps(_data(reading, row, head, channels)).replace("<", "\\u003c")
    script = files("helmholtz._notebook").joinpath("reading.js").read_text(encoding="utf-8")
    return (
        f'<div class="hz-reading"><style>{CSS}</style><div class="hz-controls" hidden></div>'
        f'<div class="hz-shown">{static}</div>{note(legend(reading))}'
        f'<script type="application/json">{data}</script></div><script>{script}</script>'
    )


def _first_tokens(reading: Reading, n: int) -> Reading:
    """The first ``n`` queries' reads of the first ``n`` tokens: all that they read, where the mixer is causal."""
    if n == reading.prior.shape[2]:
        return reading
    queries = ("mean", "free", "kl", "inner", "beta_star")
    cut = {name: getattr(reading, name)[:, :, :n] for name in queries}
    cut |= {name: getattr(reading, name)[:, :, :n, :n] for name in ("prior", "posterior")}
    return replace(reading, values=reading.values[:, :, :n], words=reading.words[:n], **cut)


def _channels_of_heads(reading: Reading, row: int) -> list[list[int]]:
    """Of each head the channels that are furthest from the prior over all queries, as many as there is room for."""
    gap = reading.kl[row].mean(1)
    n_heads, n_tokens = reading.prior.shape[1:3]
    room = MOST_WEIGHTS // (n_heads * n_tokens**2)
    most = MOST_CHANNELS if has_one_prior(reading) else max(1, min(MOST_CHANNELS, room))
    return gap.argsort(dim=-1, descending=True)[:, :most].sort(dim=-1).values.tolist()


def _data(reading: Reading, row: int, head: int, channels: list[list[int]]) -> dict[str, Any]:
    """What the script computes with: per head the prior's weights, and per channel its values, gates and beta."""
    n_channels = len(channels[0])
    index = torch.tensor(channels)
    of = torch.arange(len(channels)).unsqueeze(1)
    mean = reading.prior[row].mean(-1, keepdim=True)
    prior = mean if has_one_prior(reading) else torch.cat([mean, _chosen(reading.prior[row], index)], dim=-1)
    return {
        "head": head,
        "causal": reading.causal,
        "label": _first_label(reading),
        "words": labels(reading),
        "channels": channels,
        "priors": prior.shape[-1],
        "largest": LARGEST_BETA,
        "prior": _packed(prior.movedim(-1, 1)),  # H, P, T, S
        "values": _packed(_chosen(reading.values[row], index).transpose(-1, -2)),  # H, C, S
        "inner": _packed(_chosen(reading.inner[row], index)),  # H, T, C
        "beta": reading.beta_max[of, index].flatten().tolist(),
        "shape": [len(channels), n_channels, reading.prior.shape[2]],
    }


def _chosen(x: Float[Tensor, "H *rest V"], index: Tensor) -> Float[Tensor, "H *rest C"]:
    """Of each head the channels that are shown."""
    return torch.stack([rows[..., chosen] for rows, chosen in zip(x, index, strict=True)])


def _packed(x: Tensor) -> str:
    """Float64 numbers, little-endian, in base64."""
    return base64.b64encode(x.contiguous().numpy().astype("<f8").tobytes()).decode("ascii")
