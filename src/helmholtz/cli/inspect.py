"""``helmholtz inspect``."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._run_folder import TOKENIZER
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.data.tokenizer import load_tokenizer
from helmholtz.evals.inspection import (
    baseline_block_parameters,
    count_parameters,
    mixers,
    most_selective,
    read_text,
    summarise,
)
from helmholtz.evals.plots import plot_selection
from helmholtz.evals.runs import find_checkpoint
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.checkpoint import load_checkpoint

DESCRIPTION = "What a model is made of, what its mixers have learned, and how they read a text."


def parameter_table(model: AbstractDecoder) -> Table:
    counts = count_parameters(model)
    total = sum(count.parameters for count in counts)
    table = Table("module", "parameters", "share", title="Parameters")
    for count in counts:
        table.add_row(count.module, f"{count.parameters:,}", f"{count.parameters / total:.1%}")
    table.add_row("total", f"{total:,}", "")
    return table


def budget_lines(model: AbstractDecoder) -> list[str]:
    """Each block's mixer and feed-forward against the baseline block of the same width and heads."""
    budget = baseline_block_parameters(model)
    sizes = {count.module: count.parameters for count in count_parameters(model)}
    lines = []
    for index in range(len(model.blocks)):
        used = sizes[f"blocks.{index}.mixer"] + sizes.get(f"blocks.{index}.mlp", 0)
        lines.append(
            f"block {index}: {used:,} parameters, {used / budget - 1:+.2%} of the baseline block's {budget:,}"
        )
    return lines


def temperature_table(model: AbstractDecoder) -> Table:
    table = Table(
        "layer", "prior", "beta min", "beta mean", "beta max", title="Learned temperatures (1/value)"
    )
    for name, mixer in mixers(model).items():
        beta = mixer.beta_max
        numbers = [f"{value.item():.3f}" for value in (beta.min(), beta.mean(), beta.max())]
        table.add_row(name, mixer.config.prior, *numbers)
    return table


def reading_table(model: AbstractDecoder, text: str, checkpoint: Path, picture: Path | None) -> Table:
    """How each layer reads ``text``; the most selective head is drawn into ``picture``."""
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise ValueError(f"text: wanted at least 2 tokens to read, got {len(tokens)}")
    readings = read_text(model, torch.tensor([tokens]))
    columns = ("layer", "prior reads", "posterior reads", "beta max", "hidden beta", "KL gap", "lambda")
    table = Table(*columns, title="Reading: tokens read (effective), temperatures, KL in nats, inner gate")
    for row in summarise(model, readings):
        numbers = (
            row.num_tokens_prior,
            row.num_tokens_posterior,
            row.beta_max,
            row.beta_star,
            row.kl,
            row.inner_gate,
        )
        table.add_row(f"{row.layer} ({row.prior})", *(f"{number:.2f}" for number in numbers))
    if picture is not None:
        layer, head = most_selective(readings)
        words = [tokenizer.decode([token]) for token in tokens]
        title = f"{layer}, head {head}: what the last of {len(words)} tokens reads"
        plot_selection(readings[layer], words, picture, title=title, head=head)
    return table


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("inspect", DESCRIPTION)
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="a run (its best weights) or a checkpoint"
    )
    parser.add_argument("--text", type=str | None, default=None, help="show how the mixers read this text")
    parser.add_argument("--picture", type=str | None, default=None, help="file for a picture of the reading")
    values = parse(parser, arguments)
    checkpoint, text, picture = find_checkpoint(values["checkpoint"]), values["text"], values["picture"]
    if picture and text is None:
        raise ValueError("picture: there is nothing to draw without a text")
    model = load_checkpoint(checkpoint)
    console.print(json.dumps(json.loads((checkpoint / "config.json").read_text()), indent=2), markup=False)
    console.print(parameter_table(model))
    for line in budget_lines(model):
        console.print(line)
    if mixers(model):
        console.print(temperature_table(model))
    elif text is not None:
        raise ValueError("text: this model has no Free Energy Mixer whose reading could be shown")
    if text is not None:
        console.print(reading_table(model, text, checkpoint, Path(picture) if picture else None))
        if picture:
            console.print(f"wrote {picture}", markup=False)
    return 0
