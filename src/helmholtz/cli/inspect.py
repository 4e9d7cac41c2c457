"""``helmholtz inspect``."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._files import read_complete
from helmholtz._json import parse_json
from helmholtz.cli.arguments import make_parser, output_picture, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.evals.checkpoints import Checkpoint, open_checkpoint
from helmholtz.evals.equilibria import equilibrium_of
from helmholtz.evals.inspection import (
    baseline_block_parameters,
    count_parameters,
    mixers,
    most_selective,
    read_text,
    summarise,
)
from helmholtz.evals.plots import plot_selection
from helmholtz.layers.equilibrium_reading import equilibrium_statistics, learned_strengths
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.mixer_config import AttentionConfig
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models.decoder import Decoder, require_equilibrium

DESCRIPTION = (
    "Layers and parameters of a model, the temperatures its mixers have learned and how they read a text; of a model "
    "with an equilibrium, its learned strengths and the equilibria of a text's tokens."
)
EQUILIBRIUM_NOTES = {
    "kappa": "factor of the state-space term",
    "strength": "factor of the patterns' term",
    "contraction_bound": "of the map's Lipschitz constant on any text; below 1 every equilibrium is unique",
    "margin": "nats by which a stored pattern outweighs the others; reliable from 3",
    "slots_used": "patterns written beside the learned ones",
    "converged": "fraction of tokens",
    "retrieval_entropy": "nats; its exponential is the number of patterns a token reads",
    "usage_entropy": "nats; of the weights averaged over tokens",
    "lipschitz_local": "largest at an equilibrium",
    "lipschitz_certificate": "proven for these tokens",
}


def parameter_table(model: Decoder) -> Table:
    counts = count_parameters(model)
    total = sum(count.parameters for count in counts)
    table = Table("module", "parameters", "fraction", title="Parameters")
    for count in counts:
        table.add_row(count.module, f"{count.parameters:,}", f"{count.parameters / total:.1%}")
    table.add_row("total", f"{total:,}", "")
    return table


def stack_table(model: Decoder) -> Table:
    """A line per layer, from the first to the last, and where a plan and an equilibrium come in."""
    table = Table("layer", "mixer", "heads", "feed-forward", "beside it", title="Layers")
    plan = model.plan
    for index, layer in enumerate(model.config.layer_configs()):
        mixer = layer.mixer
        name = f"fem, {mixer.prior}" if isinstance(mixer, FreeEnergyMixerConfig) else mixer.kind
        heads = _heads(mixer) if isinstance(mixer, AttentionConfig | FreeEnergyMixerConfig) else ""
        beside = "" if plan is None or plan.layer != index else f"plan of {plan.n_bits} bits"
        table.add_row(str(index), name, heads, "" if layer.d_ff is None else f"{layer.d_ff:,}", beside)
    if model.equilibrium is not None:
        patterns = f"{model.equilibrium.config.n_patterns:,} patterns"
        table.add_row("after", "equilibrium", "", "", patterns)
    return table


def _heads(mixer: AttentionConfig | FreeEnergyMixerConfig) -> str:
    grouped = mixer.n_kv_heads not in (None, mixer.n_heads)
    return f"{mixer.n_heads} on {mixer.n_kv_heads}" if grouped else str(mixer.n_heads)


def budget_lines(model: Decoder) -> list[str]:
    """Each block's mixer and feed-forward against the baseline block of the same width and heads."""
    budget = baseline_block_parameters(model)
    sizes = {count.module: count.parameters for count in count_parameters(model)}
    lines = []
    for index in range(len(model.blocks)):
        used = sizes[f"blocks.{index}.mixer"] + sizes.get(f"blocks.{index}.mlp", 0)
        share = f"{used / budget - 1:+.2%} of the baseline block's {budget:,}"
        lines.append(f"block {index}: {used:,} parameters, {share}")
    return lines


def temperature_table(model: Decoder) -> Table:
    columns = ("layer", "prior", "beta min", "beta mean", "beta max")
    table = Table(*columns, title="Learned temperatures (1/value)")
    for name, mixer in mixers(model).items():
        beta = mixer.beta_max
        numbers = [f"{value.item():.3f}" for value in (beta.min(), beta.mean(), beta.max())]
        table.add_row(name, mixer.config.prior, *numbers)
    return table


def equilibrium_table(checkpoint: Checkpoint, text: str | None) -> Table:
    """What all tokens share and, of ``text``, where its tokens' equilibria are."""
    layer = require_equilibrium(model := checkpoint.model)
    statistics, title = learned_strengths(layer), "What the equilibrium has learned"
    if text is not None:
        tokens = checkpoint.encode(text)
        with one_convergence_warning(model):
            found = equilibrium_of(model, torch.tensor([tokens]))
        statistics |= equilibrium_statistics(layer, [found])
        title = f"{title}, and its equilibria at {len(tokens)} tokens"
    table = Table("quantity", "value", "meaning", title=title)
    for name, value in statistics.items():
        table.add_row(name, f"{value:.4g}", EQUILIBRIUM_NOTES.get(name, ""))
    return table


def _description(checkpoint: Path) -> Any:
    return parse_json((checkpoint / "config.json").read_text())


def reading_table(checkpoint: Checkpoint, text: str, picture: Path | None) -> Table:
    """How each layer reads ``text``; the most selective head is drawn into ``picture``."""
    tokens = checkpoint.encode(text)
    readings = read_text(checkpoint.model, torch.tensor([tokens]))
    columns = ("layer", "prior reads", "posterior reads", "beta max", "hidden beta", "KL gap", "lambda")
    table = Table(*columns, title="Reading: tokens read (effective), temperatures, KL in nats, inner gate")
    for summary in summarise(checkpoint.model, readings):
        layer, prior, *numbers = astuple(summary)
        table.add_row(f"{layer} ({prior})", *(f"{number:.2f}" for number in numbers))
    if picture is not None:
        layer, head = most_selective(readings)
        words = [checkpoint.tokenizer.decode([token]) for token in tokens]
        title = f"{layer}, head {head}: what the last of {len(words)} tokens reads"
        plot_selection(readings[layer], words, picture, title=title, head=head)
    return table


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("inspect", DESCRIPTION)
    add_checkpoint(parser)
    reading = "show how the mixers read this text, or the equilibria of its tokens"
    parser.add_argument("--text", type=str, help=reading)
    parser.add_argument("--picture", type=str, help="file for a figure of the reading")
    values = parse(parser, arguments)
    picture = None if values["picture"] is None else output_picture("picture", values["picture"])
    checkpoint, text = open_checkpoint(values["checkpoint"]), values["text"]
    if picture and text is None:
        raise ValueError("picture: there is nothing to draw without a text")
    model = checkpoint.model
    if picture and model.equilibrium is not None and not mixers(model):
        raise ValueError("picture: helmholtz landscape draws the equilibria of a model")
    console.print(json.dumps(read_complete(checkpoint.folder, _description), indent=2))
    console.print(stack_table(model))
    console.print(parameter_table(model))
    for line in budget_lines(model):
        console.print(line)
    if model.equilibrium is not None:
        console.print(equilibrium_table(checkpoint, text))
    if mixers(model):
        console.print(temperature_table(model))
    elif text is not None and model.equilibrium is None:
        raise ValueError(
            "text: this model has no Free Energy Mixer and no equilibrium whose reading could be shown"
        )
    if text is not None and mixers(model):
        console.print(reading_table(checkpoint, text, picture))
        if picture:
            console.print(f"wrote {picture}")
    return 0
