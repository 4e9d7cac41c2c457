"""``helmholtz train``."""

import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from helmholtz._display import make_losable
from helmholtz.cli.runs import read_model_documents, run_config, run_parser
from helmholtz.data.tokenizer import load_tokenizer
from helmholtz.layers.placement import dtype_of
from helmholtz.training.budget import matmul_peak
from helmholtz.training.callbacks import Callback
from helmholtz.training.config import RunConfig
from helmholtz.training.distributed import is_launched, is_main_process
from helmholtz.training.evaluation import AUTOCAST
from helmholtz.training.run import planned_start, prepare, train
from helmholtz.training.tracking import Profile

DESCRIPTION = (
    "Train a model on prepared text. After Ctrl-C or a crash, go on with --train.resume=auto; after the last step with "
    "more --train.steps as well. --train.continue_from and --train.init_from begin from another run. "
    "With several processes: torchrun --nproc-per-node=N -m helmholtz.cli.main train ..."
)
INTERRUPTED = 130
SHOWN_TOKENS = 64


def run(arguments: list[str], console: Console) -> int:
    read = read_model_documents(arguments)
    parser = run_parser("train", DESCRIPTION, read)
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print how the run would start, its cost and its first text, without training",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile some early steps into <output_dir>/profile",
    )
    config, options = run_config(parser, read)
    if options["dry_run"]:
        dry_run(config, console)
        return 0
    make_losable(console)
    folder = Path(config.train.output_dir)
    callbacks: list[Callback] = [Profile(folder)] if options["profile"] and is_main_process() else []
    result = train(config, callbacks=callbacks, console=console)
    if not is_main_process():
        return INTERRUPTED if result.status == "interrupted" else 0
    if result.status == "interrupted":
        command = f"{_program()} {shlex.join([*arguments, '--train.resume=auto'])}"
        console.print(f"stopped after step {result.step} and saved; go on with\n{command}")
        return INTERRUPTED
    text = f"finished {result.step} steps, {result.tokens:,} tokens; the run is in {result.folder}"
    console.print(text)
    return 0


def _program() -> str:
    """What starts this command as it was started."""
    if not is_launched():
        return "helmholtz train"
    return f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']} -m helmholtz.cli.main train"


def dry_run(config: RunConfig, console: Console) -> None:
    """Print how the run would begin, what it costs one process that does all of it, and how its first row begins."""
    start, c = planned_start(config), config.train
    steps = c.steps - start.progress.step
    of = "" if start.progress.step == 0 or steps == 0 else f"; the counts are of the {steps} steps to come"
    console.print(f"the run {start.said}{of}", highlight=False, markup=False, soft_wrap=True)
    if steps == 0:
        return
    trainer = prepare(config, start)
    budget = trainer.budget()
    dtype = AUTOCAST.get(c.precision, dtype_of(trainer.model))
    seconds = budget.flops * steps / matmul_peak(dtype, trainer.device)
    table = Table(title=f"{config.architecture}, nothing trained", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "parameters": f"{budget.parameters:,}",
        "of these trained": f"{budget.trained_parameters:,}",
        "tokens per step": f"{c.tokens_per_step:,}",
        "tokens in all": f"{c.tokens_per_step * steps:,}",
        "weights": _megabytes(budget.weight_bytes),
        "gradients": _megabytes(budget.gradient_bytes),
        "optimizer": _megabytes(budget.optimizer_bytes),
        "activations of a micro-batch": _megabytes(budget.activation_bytes),
        "memory in all": _megabytes(budget.total_bytes),
        "products per step": f"{budget.flops / 1e9:.4g} GFLOP",
        "products in all": f"{budget.flops * steps / 1e12:.4g} TFLOP",
        "at this machine's matmul speed": f"{seconds:,.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    tokens, _ = trainer.batches.micro_batch(trainer.progress.position, 0)
    text = load_tokenizer(trainer.batches.train.tokenizer_folder).decode(tokens[0, :SHOWN_TOKENS].tolist())
    console.print(f"the first of its rows begins with\n{text}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
