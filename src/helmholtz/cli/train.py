"""``helmholtz train``."""

from rich.console import Console

from helmholtz.cli.runs import run_config, run_parser
from helmholtz.training.distributed import is_main_process
from helmholtz.training.run import train

DESCRIPTION = (
    "Train a model on prepared text. After Ctrl-C or a crash, go on with --train.resume=auto. "
    "With several processes: torchrun --nproc-per-node=N -m helmholtz.cli.main train ..."
)
INTERRUPTED = 130


def run(arguments: list[str], console: Console) -> int:
    config = run_config(run_parser("train", DESCRIPTION, arguments), arguments)
    result = train(config, console=console)
    if not is_main_process():
        return INTERRUPTED if result.status == "interrupted" else 0
    if result.status == "interrupted":
        command = " ".join(["helmholtz train", *arguments, "--train.resume=auto"])
        console.print(f"stopped after step {result.step} and saved; go on with\n{command}", markup=False)
        return INTERRUPTED
    text = f"finished {result.step} steps, {result.tokens:,} tokens; the run is in {result.folder}"
    console.print(text, markup=False)
    return 0
