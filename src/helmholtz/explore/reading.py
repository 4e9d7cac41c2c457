"""How one layer of a run reads a text, and what one head of it reads at a temperature that the reader sets."""

import torch

from helmholtz._checks import check
from helmholtz._notebook.html import note
from helmholtz._notebook.reading import (
    MOST_TOKENS,
    Knob,
    QueryRead,
    channels_shown,
    legend,
    read_at,
    reading_table,
)
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.evals.inspection import mixers, read_text, readable
from helmholtz.explore.html import spell
from helmholtz.layers.fem_reading import Reading


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """Of the layers that read a free energy, then of those with attention."""
    first = mixers(checkpoint.model)
    return [*first, *(name for name in readable(checkpoint.model) if name not in first)]


def read_layer(checkpoint: Checkpoint, text: str, layer: str) -> Reading:
    """Take one layer's reading of ``text`` apart. Raises: ValueError for less than 2 tokens or more than fit."""
    tokens = checkpoint.encode(text)
    most = min(MOST_TOKENS, checkpoint.model.config.max_seq_len)
    check(len(tokens) <= most, "text", f"{len(tokens)} tokens", f"at most {most}")
    words = [spell(checkpoint.tokenizer, token) for token in tokens]
    return read_text(checkpoint.model, torch.tensor([tokens]), layer=layer, words=words)[layer]


def reading_html(
    reading: Reading,
    head: int,
    query: int,
    knob: Knob = "as trained",
    value: float = 0.0,
    n_channels: int = 8,
) -> str:
    """A row of weights per channel under attention's single row, with the numbers of each, and what they are."""
    read = read_at(reading, head, query, knob, value)
    channels = channels_shown(reading, head, query, n_channels)
    return reading_table(reading, read, query, channels) + note(f"{legend(reading)} {_average(read)}")


def _average(read: QueryRead) -> str:
    found = f"{read.num_tokens_read.mean():.1f} tokens read, KL {read.kl.mean():.2f} nats"
    return f"Averages over all {len(read.kl)} channels of this head: {found}."
