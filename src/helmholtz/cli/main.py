"""``helmholtz <command> ...``: one line per error, exit code 2 for what the user can mend and 1 for what went wrong."""

import importlib
import os
import platform
import sys
from typing import Any

from rich.console import Console

from helmholtz._checks import check_choice
from helmholtz._display import StandardOutput

GROUPS = {
    "data and training": {
        "data": "turn text into tokens on disk",
        "train": "train a model, or go on training it",
    },
    "model": {
        "evaluate": "bits per byte, perplexity and speed of a trained model",
        "generate": "continue a prompt",
        "export": "a trained model as a Hugging Face folder",
    },
    "look inside": {
        "inspect": "what a model is made of, what it has learned, and how it reads a text",
        "plan": "the latent plan of a text, and what samples share under one",
        "validate": "whether an equilibrium model keeps what its mathematics promises",
        "landscape": "the energy around a token's equilibrium, drawn",
        "explore": "all of this by hand, in a browser",
    },
    "experiments": {
        "study": "an experiment: run it, report what is done, list what is missing",
        "compare": "one table, one result file and figures for several runs",
        "report": "one page of all results, every number traceable to its file",
    },
    "installation": {
        "kernels": "native kernels for the CPU: build them, see what runs",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]
MOVED = {"synthetic": "letters", "forecast": "forecasting"} | {
    name: name for name in ("recall", "language", "selection", "continual", "vision", "mad")
}
"""What used to be commands, by the names of the studies that they are now."""

MIN_WIDTH = 80
"""Columns for tables where the terminal says 0, and at least where there is no terminal."""
INTERRUPTED = 130
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False, "soft_wrap": True}
"""What is printed holds names and texts of users, also in tables: no brackets in them are styles."""


def usage() -> str:
    lines = ["usage: helmholtz <command> [options]"]
    for title, commands in GROUPS.items():
        lines += ["", title, *(f"  {name:<10}{summary}" for name, summary in commands.items())]
    return "\n".join(
        [*lines, "", "helmholtz <command> --help lists every option with its meaning and default"]
    )


def version() -> str:
    import torch

    import helmholtz

    return (
        f"helmholtz {helmholtz.__version__} (torch {torch.__version__}, python {platform.python_version()})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        try:
            return _run(command, rest)
        finally:
            _flush()
    except BrokenPipeError:  # the reader of the output has what it wants, as with "| head"
        return 1
    except KeyboardInterrupt:
        text, code = "interrupted", INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        text, code = f"error: {_line(error)}", 2
    except (RuntimeError, MemoryError, OverflowError) as error:
        text, code = _line(error), 1
    errors = Console(stderr=True, **PLAIN)
    errors.print(f"helmholtz {command}: {text}{_rank()}")
    return code


def _run(command: str, arguments: list[str]) -> int:
    output: Any = None if sys.stdout is None else StandardOutput(sys.stdout)
    console = Console(file=output, **PLAIN)
    if console.width < 1 or not console.is_terminal:
        console.width = max(console.width, MIN_WIDTH)
    if command in ("", "-h", "--help", "--version"):
        console.print(version() if command == "--version" else usage())
        return 0 if command else 2
    if command in MOVED:
        raise ValueError(f"this command is now: helmholtz study {MOVED[command]} run")
    check_choice("command", command, COMMANDS)
    return importlib.import_module(f"helmholtz.cli.{command}").run(arguments, console)


def _flush() -> None:
    """Write what is still buffered. Raises: OSError if nobody takes it; then nothing tries again at exit."""
    try:
        if sys.stdout is not None:
            StandardOutput(sys.stdout).flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _line(error: Exception) -> str:
    """The message in one line, whatever the user's names hold; the kind of error if there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def _rank() -> str:
    """Which of torchrun's processes speaks."""
    return f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # "python -m" puts the current folder there, whose modules are not ours to import
    sys.exit(main())
