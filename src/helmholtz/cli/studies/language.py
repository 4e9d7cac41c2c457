"""``helmholtz study language``."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check_integer
from helmholtz._files import write_atomically
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.queues import LIST, add_shard, add_threads, announced, check_options, list_runs
from helmholtz.experiments.language.models import LANGUAGE_MODELS
from helmholtz.experiments.language.run import (
    CORPORA,
    TOKENIZERS,
    LanguageStudy,
    compute_language,
    language_runs,
    prepare_corpus,
    scaling_fits,
)
from helmholtz.experiments.queue import SEEDS, FinishedRun, QueuedRun, fold_finished, run_queue, shard, spread
from helmholtz.experiments.records import RUNS

ACTIONS = {
    "run": "Train language models of equal parameters on two texts, by bytes and by BPE, and three sizes of some; "
    "then the report. Each run's result is kept, and not computed again; an interrupted queue goes on where it was.",
    "report": "Table of the finished runs, and bits per byte by the number of parameters.",
    "list": LIST,
}


def result_table(done: Sequence[FinishedRun]) -> Table:
    """Bits per byte of every model on every text, mean and deviation over seeds; "<" marks a bound."""
    table = Table(title="Validation bits per byte", box=None, padding=(0, 1, 0, 0))
    for column in ("text", "tokens", "size", "model", "parameters", "bits/byte", "seeds"):
        table.add_column(
            column, justify="right" if column in ("parameters", "bits/byte", "seeds") else "left"
        )
    groups: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in done:
        key = tuple(run.run.settings[name] for name in ("corpus", "tokenizer", "size", "model"))
        groups.setdefault(key, []).append(run)
    for key, runs in groups.items():
        found = spread([run.result["bits_per_byte"] for run in runs])
        sign = "< " if runs[0].result["kind"] == "bound" else ""
        deviation = "" if found.deviation is None else f" ± {found.deviation:.3f}"
        table.add_row(
            *key, f"{runs[0].result['parameters']:,}", f"{sign}{found.mean:.3f}{deviation}", str(len(runs))
        )
    return table


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study language {action}", ACTIONS[action])
    study = LanguageStudy()
    parser.add_argument(
        "--corpora", type=str, nargs="+", default=list(CORPORA), help=f"of {', '.join(CORPORA)}"
    )
    parser.add_argument(
        "--tokenizers", type=str, nargs="+", default=list(TOKENIZERS), help=f"of {', '.join(TOKENIZERS)}"
    )
    parser.add_argument(
        "--models",
        type=str,
        nargs="+",
        default=list(LANGUAGE_MODELS),
        help=f"of {', '.join(LANGUAGE_MODELS)}",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of weights and data order")
    parser.add_argument("--steps", type=int, default=study.steps, help="optimizer steps of a run")
    parser.add_argument("--output", type=str, default="results/language", help="folder of the results")
    if action == "run":
        parser.add_argument("--data", type=str, default="data/language", help="folder of the prepared texts")
        add_shard(parser)
        add_threads(parser)
    values = parse(parser, arguments)
    check_integer("steps", values["steps"])
    check_options(values, "corpora", "tokenizers", "models", "seeds")
    return values


def work(runs: Sequence[QueuedRun], values: dict[str, Any], folder: Path, console: Console) -> None:
    """Prepare the texts, and compute the share of this machine."""
    torch.set_num_threads(values["threads"])
    mine, data = shard(runs, values["shard"]), Path(values["data"])
    for corpus in values["corpora"]:
        for tokenizer in values["tokenizers"]:
            prepare_corpus(corpus, tokenizer, data)
    run_queue(mine, partial(compute_language, data=data, folder=folder), folder, report=announced(console))


def report(runs: Sequence[QueuedRun], folder: Path, console: Console) -> None:
    """Table, slopes and ``scaling.json`` of what is finished."""
    done, missing = fold_finished(folder, runs)
    if not done:
        console.print(f"{len(missing)} runs are missing, and none is done", markup=False)
        return
    console.print(result_table(done))
    fits = scaling_fits(done)
    write_atomically(folder / "scaling.json", json.dumps({"fits": fits}, indent=1) + "\n")
    for fit in fits:
        text = f"{fit['model']}: {fit['slope']:.3f} ± {fit['standard_error']:.3f} bits/byte per tenfold parameters"
        console.print(text, markup=False)
    console.print(f"{len(done)} runs in {folder / RUNS}, {len(missing)} missing", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    values = options(action, arguments)
    study = LanguageStudy(steps=values["steps"])
    names = {name: values[name] for name in ("corpora", "tokenizers", "models", "seeds")}
    runs, folder = language_runs(study, **names), Path(values["output"])
    if action == "list":
        list_runs(folder, runs, console)
        return
    if action == "run":
        work(runs, values, folder, console)
    report(runs, folder, console)
