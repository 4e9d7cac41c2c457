"""Train the decoder without a plan.

    python examples/train_baseline.py --config configs/baseline.yaml --output-dir checkpoints/baseline

The YAML is this library's, as for ``helmholtz train``, or the original's (model, training, data): that is translated
into <output-dir>.yaml, and what it means differently is said. Run again, an interrupted training goes on.

    torchrun --nproc_per_node=auto examples/train_baseline.py --config configs/baseline.yaml --use-fsdp

shares the work among processes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console

from helmholtz._files import write_atomically
from helmholtz.cli.main import main as helmholtz
from helmholtz.interop.seeds.free_transformer.config import read_yaml
from helmholtz.interop.seeds.free_transformer.convert import convert_config
from helmholtz.training.distributed import is_main_process


def train(architecture: str, output_dir: str) -> int:
    """Read the command line and train; ``output_dir`` is the default of ``--output-dir``."""
    parser = argparse.ArgumentParser(description=f"Train the architecture {architecture}.")
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--output-dir", default=output_dir, help="folder of the run")
    parser.add_argument(
        "--use-fsdp", action="store_true", help="shard the model over the processes of torchrun"
    )
    arguments = parser.parse_args()
    file = Path(arguments.config)
    with tempfile.TemporaryDirectory() as scratch:
        return _train(file, architecture, arguments, Path(scratch))


def _train(file: Path, architecture: str, arguments: argparse.Namespace, scratch: Path) -> int:
    try:
        if "training" in read_yaml(file):
            file = _translated(file, architecture, arguments.output_dir, scratch)
        found = read_yaml(file).get("model", {}).get("architecture")
        if found != architecture:
            raise ValueError(f"model.architecture: got {found!r}, this script trains {architecture!r}")
    except (ValueError, OSError) as error:
        sys.exit(f"train: error: {file}: {error}")
    options = [f"--train.output_dir={arguments.output_dir}", "--train.resume=auto"]
    if arguments.use_fsdp:
        options.append("--parallel.strategy=fsdp")
    return helmholtz(["train", f"--config={file}", *options])


def _translated(file: Path, architecture: str, output_dir: str, scratch: Path) -> Path:
    """The translated file; of several processes one writes and explains it, the others have theirs in ``scratch``."""
    converted, notes = convert_config(read_yaml(file), architecture=architecture, output_dir=output_dir)
    target = Path(f"{output_dir.rstrip('/')}.yaml") if is_main_process() else scratch / "run.yaml"
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_main_process())
    for note in notes:
        console.print(f"{file}: {note}", style="yellow", markup=False)
    write_atomically(target, yaml.safe_dump(converted, sort_keys=False))
    return target


if __name__ == "__main__":
    sys.exit(train("transformer", "checkpoints/baseline"))
