"""``helmholtz study letters``."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from helmholtz._checks import check, check_choice, check_integer, check_non_negative
from helmholtz._display import make_losable
from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz._json import parse_json
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.queues import LIST
from helmholtz.experiments.letters.data import LetterLaw, letters_to_text, noise_floor, vanilla_floor
from helmholtz.experiments.letters.report import (
    GroupStatistics,
    LetterResult,
    kappa_label,
    law_statistics,
    measure_letters,
    plot_letters,
    sample_letter_groups,
)
from helmholtz.experiments.letters.run import PROFILES, LetterExperiment, train_on_letters
from helmholtz.models.decoder import Decoder
from helmholtz.training.checkpoint import first_difference

ACTIONS = {
    "run": "Train models whose free bits per token grow, as in the Free Transformer's paper, and measure their plans; "
    "then the report. Each model's result is kept in a file, and not computed again.",
    "report": "Table, picture and results.json of the finished models.",
    "list": LIST,
}
SHOWN = 5
"""Sequences in each of the three groups that are printed: one with a plan each, two with a plan for all."""
SHOWN_LETTER = 10
Cell = dict[str, Any]


def model_label(kappa_bits: float | None, seed: int) -> str:
    return f"{'' if kappa_bits is None else 'kappa '}{kappa_label(kappa_bits)}, seed {seed}"


def compute_cell(experiment: LetterExperiment, kappa_bits: float | None, seed: int, console: Console) -> Cell:
    """Train one model, measure it, and let it write what is printed."""
    begin, label = time.process_time(), model_label(kappa_bits, seed)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=experiment.steps)
        model = train_on_letters(
            experiment,
            kappa_bits=kappa_bits,
            seed=seed,
            callback=lambda step, loss: bar.update(
                task, completed=step, description=f"{label}: {loss:.3f} nats"
            ),
        )
    seconds = time.process_time() - begin
    result = measure_letters(model, experiment.law, seed=seed)
    return {
        "experiment": asdict(experiment),
        "kappa_bits": kappa_bits,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_cpu_seconds": seconds,
        "result": result.to_dict(),
        "samples": written_samples(model, experiment.law, seed),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": describe_hardware(),
    }


def written_samples(model: Decoder, law: LetterLaw, seed: int) -> dict[str, list[str]]:
    """Three groups from one prompt: a plan for each sequence, then twice a plan for all of them."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for number, name in enumerate(("a plan each", "one plan", "another plan")):
        shared = number > 0
        tokens = sample_letter_groups(
            model, law, [SHOWN_LETTER], size=SHOWN, shared=shared, generator=generator, seed=seed + number * SHOWN
        )  # fmt: skip
        groups[name] = [letters_to_text(row) for row in tokens[0].tolist()]
    return groups


def read_cell(file: Path, experiment: LetterExperiment) -> Cell | None:
    """The finished cell in ``file``, None if there is none. Raises: ValueError if it is of other settings."""
    if not file.exists():
        return None
    try:
        cell: Cell = parse_json(file.read_text())
        LetterResult.from_dict(cell["result"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged result ({error!r}); delete it to compute it again") from error
    difference = first_difference(cell["experiment"], asdict(experiment), "experiment")
    if difference:
        raise ValueError(f"{file} is a result of other settings: {difference}; choose another --output")
    return cell


def result_table(cells: Sequence[Cell], law: LetterLaw, own: GroupStatistics) -> Table:
    """A row per model, and one for the law, whose own sequences measure as ``own``."""
    floors = f"floor {vanilla_floor(law):.4f}, noise {noise_floor(law):.4f}"
    title = f"Nats per token ({floors}); samples under a shared plan"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    columns = ("kappa\nbits", "\nseed", "posterior\nCE", "prior\nCE", "CE - law\n+ KL", "KL bits\n/token",
               "KL bits\n/seq.", "\nvalid", "\nspread", "\"!\"\nrepeats")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        result = LetterResult.from_dict(cell["result"])
        b, shared = result.bounds, result.shared
        spread = "-" if shared.spread is None else f"{shared.spread:.1f}"
        table.add_row(
            kappa_label(cell["kappa_bits"]),
            str(cell["seed"]),
            f"{b.posterior_cross_entropy:.4f}",
            f"{b.prior_cross_entropy:.4f}",
            f"{b.excess:.4f}",
            f"{b.kl_bits:.3f}",
            f"{b.kl_bits * law.n_targets:.1f}",
            f"{result.independent.valid:.2f}",
            spread,
            f"{shared.noise_repetition:.2f}",
        )
    assert own.spread is not None
    row = ("the law", "", "", "", "", "", "", f"{own.valid:.2f}", f"{own.spread:.1f}")
    table.add_row(*row, f"{own.noise_repetition:.2f}")
    return table


def print_samples(cell: Cell, console: Console) -> None:
    console.print(model_label(cell["kappa_bits"], cell["seed"]), style="bold")
    for (name, lines), style in zip(cell["samples"].items(), ("blue", "green", "green"), strict=True):
        console.print(f"  {name}")
        for line in lines:
            console.print(f"    {line}", style=style, markup=False)


def cell_files(
    folder: Path, kappas: Sequence[float | None], seeds: Sequence[int]
) -> dict[Path, tuple[float | None, int]]:
    """Where the cells lie, in order."""
    return {
        folder / "cells" / f"{'vanilla' if kappa is None else repr(kappa)}-{seed}.json": (kappa, seed)
        for seed in seeds
        for kappa in kappas
    }  # fmt: skip


def cells_of(
    experiment: LetterExperiment, kappas: Sequence[float | None], seeds: Sequence[int], folder: Path, console: Console
) -> Iterator[Cell]:  # fmt: skip
    """The cells in order, each computed and written unless it is there."""
    for file, (kappa, seed) in cell_files(folder, kappas, seeds).items():
        cell = read_cell(file, experiment)
        if cell is None:
            cell = compute_cell(experiment, kappa, seed, console)
            write_atomically(file, json.dumps(cell, indent=1) + "\n")
        yield cell


def summary(cells: Sequence[Cell], profile: str, law: LetterLaw, own: GroupStatistics) -> dict[str, Any]:
    """All cells in one, the settings they share and what the law itself gives."""
    return {
        "profile": profile,
        "experiment": cells[0]["experiment"],
        "vanilla_floor": vanilla_floor(law),
        "noise_floor": noise_floor(law),
        "law": asdict(own),
        "cells": [{name: value for name, value in cell.items() if name != "experiment"} for cell in cells],
    }


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study letters {action}", ACTIONS[action])
    parser.add_argument(
        "--kappas",
        type=float,
        nargs="+",
        default=[1 / 64, 1 / 8, 1.0, 8.0],
        help="free bits per token, a model for each, beside a decoder without a plan",
    )
    parser.add_argument("--profile", type=str, default="ci", help=f"sizes: {', '.join(PROFILES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each gives every model anew")
    parser.add_argument("--output", type=str, default="results/synthetic", help="folder of the result")
    if action == "run":
        parser.add_argument(
            "--threads", type=int, default=1, help="CPU threads; more help these models little"
        )
    values = parse(parser, arguments)
    check_choice("profile", values["profile"], PROFILES)
    check_integer("threads", values.get("threads", 1))
    for kappa in values["kappas"]:
        check_non_negative("kappas", kappa)
    for seed in values["seeds"]:
        check_integer("seeds", seed, minimum=0)
    return values


def report(cells: Sequence[Cell], profile: str, folder: Path, console: Console) -> None:
    """Table, ``results.json`` and ``letters.png``."""
    law = PROFILES[profile].law
    own = law_statistics(law, generator=torch.Generator().manual_seed(0))
    console.print(result_table(cells, law, own))
    content = summary(cells, profile, law, own)
    write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")
    measured = [(cell["kappa_bits"], LetterResult.from_dict(cell["result"])) for cell in cells]
    plot_letters(law, measured, own, folder / "letters.png")
    console.print(f"wrote {folder / 'results.json'} and {folder / 'letters.png'}", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    make_losable(console)
    values = options(action, arguments)
    experiment, folder = PROFILES[values["profile"]], Path(values["output"])
    kappas, seeds, cells = [None, *values["kappas"]], values["seeds"], []
    if action == "run":
        torch.set_num_threads(values["threads"])
        for cell in cells_of(experiment, kappas, seeds, folder, console):
            print_samples(cell, console)
            cells.append(cell)
        report(cells, values["profile"], folder, console)
        return
    for file, (kappa, seed) in cell_files(folder, kappas, seeds).items():
        done = read_cell(file, experiment)
        if done is not None:
            cells.append(done)
        if action == "list" or done is None:
            console.print(
                f"{'missing' if done is None else 'done   '}  {model_label(kappa, seed)}", markup=False
            )
    if action == "report":
        check(
            bool(cells), "output", str(folder), "a folder of results; helmholtz study letters run makes them"
        )
        report(cells, values["profile"], folder, console)
