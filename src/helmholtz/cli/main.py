"""``helmholtz <command> ...``: one line per error, exit code 2 for what the user can mend and 1 for what went wrong."""

import importlib
import os
import sys

from rich.console import Console

from helmholtz._checks import check_choice

COMMANDS = {
    "data": "turn text into tokens on disk",
    "train": "train a model, or go on training it",
    "evaluate": "bits per byte, perplexity and speed of a trained model",
    "generate": "continue a prompt",
    "plan": "the latent plan of a text, and what samples share under one",
    "synthetic": "the experiment of the Free Transformer on a law whose entropy is known",
    "recall": "what a Hopfield memory recalls of spoilt patterns, keys and pairs in a context",
    "language": "language models of equal parameters on two texts, and how they scale",
    "report": "one page of all results, every number traceable to its file",
    "selection": "which token every channel can read: attention and free energy against the law",
    "continual": "learning one map after another with and without a memory",
    "forecast": "time series: encoders of attention and of FEM against a linear and a naive forecast",
    "vision": "a small vision transformer of attention or of FEM on digits and Fashion-MNIST",
    "mad": "the six MAD tasks: attention, the Free Energy Mixer and its parts, Mamba, Mamba-Hopfield",
    "compare": "one table, one result file and pictures for several runs",
    "validate": "whether an equilibrium model keeps what its mathematics promises",
    "landscape": "the energy around a token's equilibrium, drawn",
    "inspect": "what a model is made of, what it has learned, and how it reads a text",
    "export": "a trained model as a Hugging Face folder",
}


def usage() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: helmholtz <command> [options]", "", *lines, "", "helmholtz <command> --help tells more"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(usage(), markup=False)
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        check_choice("command", command, COMMANDS)
        return importlib.import_module(f"helmholtz.cli.{command}").run(rest, console)
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"helmholtz {command}: error: {_line(error)}{_rank()}", markup=False)
        return 2
    except RuntimeError as error:
        errors.print(f"helmholtz {command}: {_line(error)}{_rank()}", markup=False)
        return 1


def _line(error: Exception) -> str:
    """The message in one line, whatever the user's names hold; the kind of error if there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def _rank() -> str:
    """Which of torchrun's processes speaks."""
    return f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""


if __name__ == "__main__":
    sys.exit(main())
