"""How one head of a Free Energy Mixer reads a text at a temperature that the reader sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check, check_choice
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.evals.inspection import mixers, read_text
from helmholtz.explore.html import (
    BETA,
    LAMBDA,
    NOTHING,
    cells,
    head_cells,
    heat,
    note,
    number,
    spell,
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


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One layer's reading of a text."""

    layer: str
    prior: str
    """Name of the prior."""
    words: tuple[str, ...]
    reading: Reading

    @property
    def n_heads(self) -> int:
        return self.reading.prior.shape[1]


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


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """Of the layers that read a free energy."""
    return list(mixers(checkpoint.model))


def read_layer(checkpoint: Checkpoint, text: str, layer: str) -> LayerReading:
    """Take one layer's reading of ``text`` apart. Raises: ValueError for less than 2 tokens or more than fit."""
    tokens = checkpoint.encode(text)
    most = min(MOST_TOKENS, checkpoint.model.config.max_seq_len)
    check(len(tokens) <= most, "text", f"{len(tokens)} tokens", f"at most {most}")
    reading = read_text(checkpoint.model, torch.tensor([tokens]), layer=layer)[layer]
    prior = mixers(checkpoint.model)[layer].config.prior
    return LayerReading(layer, prior, tuple(spell(checkpoint.tokenizer, t) for t in tokens), reading)


def read_at(
    reading: Reading, head: int, query: int, knob: Knob = "as trained", value: float = 0.0
) -> QueryRead:
    """The read of token ``query`` by ``head``.

    Args:
        knob: "as trained": each channel has its own gate; "inner gate": ``value`` in [0, 1] is that of all channels;
            "beta": ``value`` is the temperature of all channels.

    Raises: ValueError for a head, token or value that is not there.
    """
    n_heads, n_tokens = reading.prior.shape[1:3]
    check_choice("knob", knob, KNOBS)
    check(0 <= head < n_heads, "head", head, f"in [0, {n_heads})")
    check(0 <= query < n_tokens, "query", query, f"in [0, {n_tokens}), the text's tokens")
    prior, values = reading.prior[0, head, query].T, reading.values[0, head].T
    gate, beta_max = reading.inner[0, head, query], reading.beta_max[head]
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


def channels_shown(reading: Reading, head: int, query: int, n_channels: int) -> list[int]:
    """The channels whose read is furthest from the prior's at ``beta_max``: the same wherever the slider is."""
    gap = reading.kl[0, head, query]
    return sorted(gap.argsort(descending=True)[:n_channels].tolist())


def reading_html(
    found: LayerReading,
    head: int,
    query: int,
    knob: Knob = "as trained",
    value: float = 0.0,
    n_channels: int = 8,
) -> str:
    """A row of weights per channel under attention's single row, with the numbers of each."""
    read = read_at(found.reading, head, query, knob, value)
    chosen = channels_shown(found.reading, head, query, n_channels)
    shown = slice(0, query + 1)  # what comes later is not read
    numbers = (f"{BETA}*", "mean", "free energy", "KL, nats", "tokens read", f"gate {LAMBDA}")
    columns = [head_cells("channel"), *token_heads(found.words[shown], here=query), head_cells(*numbers)]
    same = bool((read.prior - read.prior[:1]).abs().max() < 1e-6)
    label = "attention" if found.prior == "softmax" else "prior" if same else "prior (mean)"
    rows = [_prior_row(read, label, shown)]
    rows += [_channel_row(read, channel, shown) for channel in chosen]
    return table(columns, rows) + note(_legend(found, read, same))


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


def _legend(found: LayerReading, read: QueryRead, same: bool) -> str:
    single = (
        "the row that attention with these keys would read, in every channel"
        if found.prior == "softmax"
        else "the prior, which every channel would read without a temperature"
    )
    first = single if same else "the mean of the channels' priors"
    average = f"{read.num_tokens_read.mean():.1f} tokens read, KL {read.kl.mean():.2f} nats"
    return (
        f"Cells are percents of weight. The first row is {first}. Below it is what each channel reads: weights "
        f"proportional to prior times exp({BETA}* value). Averages over all "
        f"{len(read.kl)} channels of this head: {average}."
    )


def default_query(words: Sequence[str]) -> int:
    """The last token: it has the most to read."""
    return len(words) - 1
