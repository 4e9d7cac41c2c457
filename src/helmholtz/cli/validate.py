"""``helmholtz validate``."""

import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helmholtz._checks import check_integer
from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.cli.arguments import Parser, make_parser, output_file, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.evals.checkpoints import open_checkpoint
from helmholtz.evals.convergence import ConvergenceReport, ConvergenceValidator
from helmholtz.models.decoder import Decoder, require_equilibrium
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig

DESCRIPTION = (
    "Whether a Mamba-Hopfield model keeps what its mathematics promises: contraction, descent, stability, uniqueness, "
    "gradient, causality. The exit code is 1 if a check fails."
)
FRESH = {"vocab_size": 256, "d_model": 64, "d_state": 64, "d_head": 32, "n_layers": 6, "n_patterns": 256}
"""The original's shape, narrow."""


def make_validate_parser() -> Parser:
    parser = make_parser("validate", DESCRIPTION)
    option = parser.add_argument
    add_checkpoint(parser, required=False)
    option(
        "--fresh",
        action="store_true",
        help="test a new model with the sizes under model, instead of a checkpoint",
    )
    option("--text", type=str, default=None, help="text to test on; default: random tokens")
    option("--batch", type=int, default=2, help="number of sequences of random tokens")
    option("--time", type=int, default=16, help="random tokens per sequence")
    option(
        "--seed", type=int, default=0, help="seed of the new model, the random tokens and the perturbations"
    )
    option("--output", type=str, default=None, help="JSON file for all measurements")
    option("--json", action="store_true", help="print JSON instead of the table")
    option("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_class_arguments(MambaHopfieldConfig, "model", skip={"solver"})
    parser.set_defaults({f"model.{name}": value for name, value in FRESH.items()})
    return parser


def options(arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming what is wrong or has no meaning."""
    parser = make_validate_parser()
    values = parse(parser, arguments)
    if (values["checkpoint"] is None) != values["fresh"]:
        raise ValueError("checkpoint and fresh: wanted one of them")
    defaults = parser.get_defaults().as_dict()
    changed = [name for name, value in values["model"].items() if value != defaults["model"][name]]
    if values["checkpoint"] is not None and changed:
        raise ValueError(
            f"model.{changed[0]} and checkpoint: a saved model has its sizes; they are for --fresh"
        )
    if values["fresh"] and values["text"] is not None:
        raise ValueError("text and fresh: a new model has no tokenizer")
    for name in ("batch", "time"):
        if values["text"] is not None and values[name] != defaults[name]:
            raise ValueError(f"{name} and text: {name} is of random tokens")
        check_integer(name, values[name])
    check_integer("seed", values["seed"], minimum=0)
    check_integer("threads", values["threads"])
    return values


def load(values: dict[str, Any]) -> tuple[Decoder, torch.Tensor | None]:
    """The model to test, and the tokens of the text if there is one."""
    if values["fresh"]:
        torch.manual_seed(values["seed"])
        return MambaHopfield(MambaHopfieldConfig.from_dict(values["model"])), None
    found, text = open_checkpoint(values["checkpoint"], "equilibrium"), values["text"]
    return found.model, None if text is None else torch.tensor([found.encode(text)])


def report_table(report: ConvergenceReport) -> Table:
    """A line per number: first those that decide, with their limits, then those that are told."""
    table = Table("test", "number", "measured", "limit", "", box=None, padding=(0, 2, 0, 0))
    for name, test in report.tests().items():
        for line in test.checks():
            verdict = Text("passed", "green") if line.passed else Text("FAILED", "bold red")
            limit = f"{line.comparison} {line.limit:.4g}"
            table.add_row(name, line.what, f"{line.measured:.4g}", limit, verdict)
            name = ""
        for what, value in test.notes().items():
            table.add_row("", what, f"{value:.4g}", "", "")
    return table


def run(arguments: list[str], console: Console) -> int:
    values = options(arguments)
    output = None if values["output"] is None else output_file("output", values["output"])
    torch.set_num_threads(values["threads"])
    model, tokens = load(values)
    begin = time.perf_counter()
    sizes = {"seed": values["seed"], "batch": values["batch"], "time": values["time"]}
    report = ConvergenceValidator(model, tokens, **sizes).run_all_tests()
    result = {
        "model": model.config.to_dict(),
        "checkpoint": values["checkpoint"],
        **report.to_dict(),
        "seed": values["seed"],
        "seconds": time.perf_counter() - begin,
        "commit": git_commit(),
        "hardware": describe_hardware(),
    }
    text = json.dumps(result, indent=1)
    if values["json"]:
        console.print(text)
    else:
        console.print(report_table(report))
        verdict = "all tests passed" if report.all_passed else f"failed: {', '.join(report.failed)}"
        console.print(
            f"{require_equilibrium(model).config.stability} regime, {result['seconds']:.0f} s: {verdict}"
        )
    if output is not None:
        write_atomically(output, text + "\n")
    return 0 if report.all_passed else 1
